"""Which weights dropout keeps: the same pure function of (seed, batch, head, query, key) as `flash_attend.dropout`."""

import triton
import triton.language as tl

from flash_attend.dropout import ROUNDS
from flash_attend.kernels.compat import aggregate

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _without_bit_3(first, SIZE: tl.constexpr):
    """The `SIZE // 2` positions from `first` (a multiple of 16) on whose bit 3 is 0."""
    position = tl.arange(0, SIZE // 2)
    return (first + position // 8 * 16 + position % 8).to(tl.uint32)


@aggregate
class Dropout:
    """Dropout on the normalised weights of one head, if ON. `factor` is what kept weights are multiplied by."""

    seed: object
    keep_threshold: tl.tensor
    factor: tl.tensor
    batch: object
    head: object
    ON: tl.constexpr

    @triton.jit
    def of_head(self, batch, head):
        """The same for a head."""
        return Dropout(self.seed, self.keep_threshold, self.factor, batch, head, self.ON)

    @triton.jit
    def drop(self, weights, kept):
        """The weights that stay, without their factor: sums of what they weigh are multiplied by it at their end."""
        if self.ON:
            weights = tl.where(kept, weights, 0.0)
        return weights

    @triton.jit
    def gradient(self, grad_weights, kept):
        """The gradient of the weights before dropout, from that of the weights after it."""
        if self.ON:
            grad_weights = tl.where(kept, grad_weights * self.factor, 0.0)
        return grad_weights

    @triton.jit
    def kept(
        self, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False
    ):
        """[BLOCK_M, BLOCK_N] booleans, or [BLOCK_N, BLOCK_M] if TRANSPOSED: True where the weight stays.

        One Philox call (Salmon et al. 2011) gives the four words of {x, x + 8} in both directions. In the accumulator
        of a tensor-core product one thread owns just these four, in the scores and in their transpose alike, so
        nothing moves between threads.
        """
        if not self.ON:
            return True
        else:
            if TRANSPOSED:
                ROWS: tl.constexpr = BLOCK_N
                COLUMNS: tl.constexpr = BLOCK_M
                query = _without_bit_3(first_query, BLOCK_M)[None, :]
                key = _without_bit_3(first_key, BLOCK_N)[:, None]
            else:
                ROWS: tl.constexpr = BLOCK_M
                COLUMNS: tl.constexpr = BLOCK_N
                query = _without_bit_3(first_query, BLOCK_M)[:, None]
                key = _without_bit_3(first_key, BLOCK_N)[None, :]
            zero = tl.zeros([ROWS // 2, COLUMNS // 2], tl.uint32)
            head = self.head.to(tl.uint32)
            batch = self.batch.to(tl.uint32)
            word0, word1, word2, word3 = tl.philox(
                self.seed, zero + query, zero + key, zero + head, zero + batch, PHILOX_ROUNDS
            )
            # Word 2 * (query bit 3) + (key bit 3); below, the last two dimensions are [column bit, row bit].
            if TRANSPOSED:
                words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
            else:
                words = tl.join(tl.join(word0, word1), tl.join(word2, word3))
            words = tl.reshape(words, [ROWS // 16, 8, COLUMNS // 16, 8, 2, 2])
            words = tl.reshape(tl.permute(words, (0, 5, 1, 2, 4, 3)), [ROWS, COLUMNS])
            return words >= self.keep_threshold


@triton.jit
def dropout_by(SEED, keep_threshold, keep_scale, ON: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Dropout by the seed at SEED, of no head yet. `keep_scale` is a float64 scalar."""
    seed = tl.load(SEED) if ON else 0
    return Dropout(seed, keep_threshold, tl.full([], keep_scale, tl.float64).to(ACCUMULATOR), 0, 0, ON)
