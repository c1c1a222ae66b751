"""Who may see whom. `Mask` is the only thing that knows: which blocks a tile visits, and which of its pairs are hidden.

Three kinds of masks, the values of `MaskKind`: NONE; KEY, one visibility for each key (int32, padded to whole
blocks); and DENSE, one bit for each pair with causality and bounds already folded in (int32 words of 32 keys, padded
to whole blocks).
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate
from flash_attend.kernels.schedule import BITS_PER_WORD, band_walk, bounded_walk, cut_walk, listed_walk
from flash_attend.kernels.softmax import NEGATIVE_INFINITY

NONE = tl.constexpr(0)
KEY = tl.constexpr(1)
DENSE = tl.constexpr(2)


@aggregate
class Mask:
    """Who may see whom, of one head: the key mask or the dense one of its `plane`, causality or a window, and the ends
    of queries and keys.

    Query `x` is at the position of key `x + keys - queries`. It sees keys from `left` before that one on, unless None;
    if CAUSAL, up to that one, or to `right` after it, unless None.

    HIDES_KEYS: whether `hide` hides keys too, or only pairs. Where a tile's sums are by keys, those of hidden ones may
    be anything until they are cleared.
    """

    planes: object
    plane: object
    visible: object  # where the words of the plane begin
    words_per_query: object  # of a dense mask
    queries: tl.tensor
    keys: tl.tensor
    left: object
    right: object
    KIND: tl.constexpr
    CAUSAL: tl.constexpr
    HIDES_KEYS: tl.constexpr

    @triton.jit
    def of_head(self, batch, head):
        """The same for a head."""
        plane = self.planes.index(batch, head)
        visible = None
        words = self.planes.words_per_query()
        if self.KIND == DENSE:
            visible = self.planes.pairs(plane)
        elif self.KIND == KEY:
            visible = self.planes.keys(plane)
        return Mask(
            self.planes, plane, visible, words, self.queries, self.keys, self.left, self.right, self.KIND, self.CAUSAL,
            self.HIDES_KEYS,
        )  # fmt: skip

    @triton.jit
    def counted_from(self, first_query, first_key):
        """The same for pairs whose queries and keys are counted from these on. For `hide` and `key_shown`, and not of a
        dense mask."""
        visible = self.visible
        if self.KIND == KEY:
            visible = visible + first_key
        queries = self.queries - first_query
        keys = self.keys - first_key
        return Mask(
            self.planes, self.plane, visible, None, queries, keys, self.left, self.right, self.KIND, self.CAUSAL,
            self.HIDES_KEYS,
        )  # fmt: skip

    @triton.jit
    def last_offset(self):
        """Where there is causality: the last key that query 0 sees, if the keys went on both ways."""
        offset = self.keys - self.queries
        if self.right is not None:
            offset += self.right
        return offset

    @triton.jit
    def first_offset(self):
        """Where there is a left edge: the first key that query 0 sees, likewise."""
        return self.keys - self.queries - self.left

    # Which blocks a tile visits

    @triton.jit
    def walk_over_keys(self, first_query, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, part=0, parts=None):
        """The key blocks that a tile of queries visits, or one of so many `parts` of them, unless None."""
        if parts is None:
            return self._walk_over_all_keys(first_query, BLOCK_M, BLOCK_N)
        else:
            return self._walk_over_part(first_query, BLOCK_M, BLOCK_N, part, parts)

    @triton.jit
    def _walk_over_part(self, first_query, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, part, parts):
        """Parts are of one length, but for the last ones, and whole blocks of the schedule. What lies before the first
        key that is visible, or after the last one, is in none."""
        RATIO: tl.constexpr = 1 if self.KIND == NONE else self.planes.BLOCK_N // BLOCK_N
        line = None
        if self.KIND == DENSE:
            line = self.planes.line_of_queries(self.plane, first_query)
            begin = 0
            full_begin = 0
            full_end = self.planes.n_key_blocks * RATIO
            end = full_end
        else:
            begin, full_begin, full_end, end = self.key_blocks(first_query, BLOCK_M, BLOCK_N)
            if self.KIND == KEY:
                line = self.planes.line_of_keys(self.plane)
        if line is not None:
            begin = tl.maximum(tl.load(line + 1) * RATIO, begin)
            end = tl.minimum(tl.load(line + 2) * RATIO, end)
        start = begin // RATIO
        length = tl.cdiv(tl.maximum(tl.cdiv(end, RATIO) - start, 0), parts)
        low = tl.minimum(tl.maximum((start + part * length) * RATIO, begin), end)
        high = tl.maximum(tl.minimum((start + (part + 1) * length) * RATIO, end), low)
        full_begin = tl.minimum(tl.maximum(full_begin, low), high)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), high)
        if line is None:
            return bounded_walk(low, full_begin, full_end, high)
        else:
            return band_walk(line, self.planes.n_key_blocks, low, full_begin, full_end, high, RATIO)

    @triton.jit
    def _walk_over_all_keys(self, first_query, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        RATIO: tl.constexpr = self.planes.BLOCK_N // BLOCK_N
        if self.KIND == DENSE:
            return listed_walk(self.planes.line_of_queries(self.plane, first_query), self.planes.n_key_blocks, RATIO)
        else:
            begin, full_begin, full_end, end = self.key_blocks(first_query, BLOCK_M, BLOCK_N)
            if self.KIND == KEY:
                line = self.planes.line_of_keys(self.plane)
                if self.left is None:
                    return cut_walk(line, self.planes.n_key_blocks, full_end, end, RATIO)
                else:
                    return band_walk(line, self.planes.n_key_blocks, begin, full_begin, full_end, end, RATIO)
            else:
                return bounded_walk(begin, full_begin, full_end, end)

    @triton.jit
    def walk_over_queries(self, first_key, any_key, hides_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """The query blocks that visit a tile of keys: none unless `any_key` is visible. Where the tile's own keys need
        hiding, `hides_keys`, no block is full. The lists are the transposed ones."""
        if self.KIND == DENSE:
            RATIO: tl.constexpr = self.planes.BLOCK_M // BLOCK_M
            return listed_walk(self.planes.line_of_key_block(self.plane, first_key), self.planes.n_query_blocks, RATIO)
        else:
            begin, full_begin, full_end, end = self.query_blocks(first_key, BLOCK_M, BLOCK_N)
            end = tl.where(any_key, end, begin)
            full_begin = tl.where(hides_keys, end, tl.minimum(full_begin, end))
            full_end = tl.maximum(tl.minimum(full_end, end), full_begin)
            return bounded_walk(begin, full_begin, full_end, end)

    @triton.jit
    def key_blocks(self, first_query, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """Key blocks of a tile of queries, as far as causality, a window and the last key go: every query sees all of
        the blocks `[full_begin, full_end)`; `[begin, full_begin)` crosses the window's left edge, `[full_end, end)`
        the diagonal or the end."""
        begin = 0
        full_begin = 0
        full_end = self.keys // BLOCK_N
        end = tl.cdiv(self.keys, BLOCK_N)
        if self.CAUSAL:
            offset = self.last_offset()
            last_query = tl.minimum(first_query + BLOCK_M, self.queries) - 1
            full_end = tl.minimum(tl.maximum(first_query + offset + 1, 0) // BLOCK_N, full_end)
            seen_end = tl.cdiv(tl.maximum(last_query + offset + 1, 0), BLOCK_N)
            end = seen_end if self.right is None else tl.minimum(seen_end, end)
        if self.left is not None:
            last_query = tl.minimum(first_query + BLOCK_M, self.queries) - 1
            begin = tl.maximum(first_query + self.first_offset(), 0) // BLOCK_N
            full_begin = tl.minimum(tl.cdiv(tl.maximum(last_query + self.first_offset(), 0), BLOCK_N), end)
            full_end = tl.maximum(full_end, full_begin)
        return begin, full_begin, full_end, end

    @triton.jit
    def query_blocks(self, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """Query blocks of a tile of keys, as far as causality, a window and the last query go: every query of the
        blocks `[full_begin, full_end)` exists and sees all keys; `[begin, full_begin)` crosses the diagonal,
        `[full_end, end)` the window's left edge or the end."""
        begin = 0
        full_begin = 0
        end = tl.cdiv(self.queries, BLOCK_M)
        last_key = first_key + BLOCK_N - 1
        if self.left is not None or self.right is not None:
            last_key = tl.minimum(last_key, self.keys - 1)
        if self.left is not None:
            end = tl.minimum(tl.cdiv(tl.maximum(last_key - self.first_offset() + 1, 0), BLOCK_M), end)
        if self.CAUSAL:
            offset = self.last_offset()
            begin = tl.minimum(tl.maximum(first_key - offset, 0) // BLOCK_M, end)
            full_begin = tl.minimum(tl.cdiv(tl.maximum(last_key - offset, 0), BLOCK_M), end)
        full_end = self.queries // BLOCK_M
        if self.left is not None:
            full_end = tl.minimum(tl.maximum(first_key - self.first_offset() + 1, 0) // BLOCK_M, full_end)
        full_end = tl.maximum(full_end, full_begin)
        return begin, full_begin, full_end, end

    # Who sees anything at all

    @triton.jit
    def first_key(self, position):
        """The first key that the key mask shows, `keys` if none; `position` counts from 0 through a block of the
        schedule."""
        key = 0
        if self.KIND == KEY:
            first_block = tl.load(self.planes.line_of_keys(self.plane) + 1)
            candidate = first_block * self.planes.BLOCK_N + position
            # No block shows any, and there may be none.
            exists = candidate < self.planes.n_key_blocks * self.planes.BLOCK_N
            shown = tl.load(self.visible + candidate, mask=exists, other=0)
            key = tl.min(tl.where(shown != 0, candidate, self.keys), 0)
        return key

    @triton.jit
    def first_live_query(self, position):
        """The first query that sees a key, as all after it do; `queries` if none does. Not of a dense mask, nor of a
        key mask in a window with a left edge."""
        key = self.first_key(position)
        if self.CAUSAL and self.right is None:
            first = tl.minimum(tl.maximum(key - self.last_offset(), 0), self.queries)
        else:
            first = tl.where(key < self.keys, 0, self.queries)
            if self.right is not None:
                first = tl.maximum(first, key - self.last_offset())
        return first

    @triton.jit
    def alive(self, query, first_query, in_doubt, bias=None, first_row=None):
        """Which queries [SIZE], of SIZE from the first one on, see a key. Of a dense mask, and of a key mask in a
        window with a left edge, those that are `in_doubt` [SIZE]: others count as alive. Likewise with a `bias`, unless
        None, which may hide all that a query sees, and which has rows from `first_row` on; a dense mask holds it."""
        if self.KIND == DENSE:
            return self._see_pairs(query, in_doubt) | (in_doubt == 0)
        elif self.KIND == KEY and self.left is not None:
            return self._see_keys(query, first_query, in_doubt, bias, first_row) | (in_doubt == 0)
        else:
            alive = query >= self.first_live_query(tl.arange(0, self.planes.BLOCK_N))
            if bias is not None:
                in_doubt = in_doubt & alive
                alive = alive & (self._see_keys(query, first_query, in_doubt, bias, first_row) | (in_doubt == 0))
            return alive

    @triton.jit
    def _see_pairs(self, query, in_doubt):
        """Which queries [SIZE] see a key by a dense mask, if any is in doubt."""
        STEP: tl.constexpr = 16
        SIZE: tl.constexpr = query.shape[0]
        any_in_doubt = tl.max(in_doubt.to(tl.int32), 0)
        row = self.visible + query.to(tl.int64) * self.words_per_query
        seen = tl.zeros([SIZE, STEP], tl.int32)
        for first in tl.range(0, self.words_per_query * any_in_doubt, STEP):
            word = first + tl.arange(0, STEP)
            words = tl.load(row[:, None] + word[None, :], mask=(word < self.words_per_query)[None, :], other=0)
            seen = tl.where(words != 0, 1, seen)
        return tl.max(seen, 1) != 0

    @triton.jit
    def _see_keys(self, query, first_query, in_doubt, bias, first_row):
        """Which queries [SIZE] see a key that a bias, unless None, does not hide, if any is in doubt."""
        STEP: tl.constexpr = 16
        SIZE: tl.constexpr = query.shape[0]
        any_in_doubt = tl.max(in_doubt.to(tl.int32), 0)
        begin, _, _, end = self.key_blocks(first_query, SIZE, STEP)
        seen = tl.zeros([SIZE, STEP], tl.int32)
        for block in tl.range(begin, begin + (end - begin) * any_in_doubt):
            first_key = tl.full([], block * STEP, tl.int32)  # a number in the interpreter
            key = first_key + tl.arange(0, STEP)
            pairs = self.hide(seen * 0 + 1, query[:, None], key[None, :], self.key_shown(key)[None, :], 0)
            if bias is not None:
                hidden = bias.load(first_row, first_key, SIZE, STEP, MASKED=True, TRANSPOSED=False)
                pairs = tl.where(hidden == NEGATIVE_INFINITY, 0, pairs)
            seen = tl.maximum(seen, pairs)
        return tl.max(seen, 1) != 0

    # What of it is hidden

    @triton.jit
    def key_shown(self, key):
        """[SIZE] booleans: keys that exist, that the key mask shows, and that do not lie before every window."""
        # int32, not bytes: a byte load behind a product's operand makes the compiler choose a poor layout for it.
        shown = tl.load(self.visible + key) != 0 if self.KIND == KEY else key < self.keys
        if self.left is not None:
            shown = shown & (key >= self.first_offset())
        return shown

    @triton.jit
    def pairs_shown(
        self, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
    ):
        """[BLOCK_M, BLOCK_N] booleans of a dense mask, or [BLOCK_N, BLOCK_M] if TRANSPOSED.

        Each word is loaded once and spread over its bits: a load for each pair would hold a pointer for each pair.
        """
        BITS: tl.constexpr = min(BLOCK_N, BITS_PER_WORD)
        query = (first_query + tl.arange(0, BLOCK_M)).to(tl.int64) * self.words_per_query
        word = first_key // BITS_PER_WORD + tl.arange(0, BLOCK_N // BITS)
        bit = first_key % BITS_PER_WORD + tl.arange(0, BITS)
        if TRANSPOSED:
            words = tl.load(self.visible + word[:, None] + query[None, :])
            pairs = tl.reshape((words[:, None, :] >> bit[None, :, None]) & 1, [BLOCK_N, BLOCK_M])
        else:
            words = tl.load(self.visible + query[:, None] + word[None, :])
            pairs = tl.reshape((words[:, :, None] >> bit[None, None, :]) & 1, [BLOCK_M, BLOCK_N])
        return pairs != 0

    @triton.jit
    def shown(self, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """What `hide` needs for a tile of scores [BLOCK_M, BLOCK_N], and which keys [BLOCK_N] any of its queries may
        see: the rows of k or v of the others may hold NaN and must not reach a product."""
        if self.KIND == DENSE:
            pairs = self.pairs_shown(first_query, first_key, BLOCK_M, BLOCK_N, TRANSPOSED=False)
            return pairs, tl.max(pairs.to(tl.int32), 0) != 0
        else:
            shown = self.key_shown(first_key + tl.arange(0, BLOCK_N))
            return shown[None, :], shown

    @triton.jit
    def hide(self, x, query, key, shown, fill):
        """`x` with `fill` in the place of every pair that may not meet: scores with -inf, weights and gradients with 0.

        `query`, `key` and `shown` broadcast to x, so that one function serves scores and transposed scores. Selects,
        never sums: what a hidden key held, NaN included, must vanish. Two selects, not one `&`, which makes the
        compiler pack predicates into bit fields.
        """
        if self.KIND == DENSE:
            x = tl.where(shown, x, fill)
        else:
            if self.CAUSAL:
                x = tl.where(key <= query + self.last_offset(), x, fill)
            if self.left is not None:
                x = tl.where(key >= query + self.first_offset(), x, fill)
            # Causality alone hides the keys past the end from every query that exists.
            if self.HIDES_KEYS and (self.KIND == KEY or not self.CAUSAL or self.right is not None):
                x = tl.where(shown, x, fill)
        return x


@triton.jit
def masks_of_call(
    planes, queries, keys, window_left, window_right, KIND: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, HIDES_KEYS: tl.constexpr,
):  # fmt: skip
    """Who may see whom, of no head yet. LEFT and RIGHT say whether the window has these edges; CAUSAL, that its right
    one is at each query's own position. A dense mask's schedule holds them already."""
    left = window_left if LEFT else None
    right = window_right if RIGHT else None
    return Mask(planes, 0, None, None, queries, keys, left, right, KIND, CAUSAL or RIGHT, HIDES_KEYS)
