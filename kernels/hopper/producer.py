"""What producers copy: the blocks of k and v that a tile of queries visits, or of queries that visit a tile of keys."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attend.kernels.hopper.plain import masked_block, masked_count, run_bounds, run_count
from flash_attend.kernels.hopper.ring import SLOTS, fill, fill_both, place
from flash_attend.kernels.hopper.walk import first_block_of

SHIFTS = gl.constexpr(4)  # float32 in 16 bytes: along the last dimension a bulk copy begins at a multiple of those


@gluon.jit
def fill_blocks(
    inputs, rings, walk, batch, kv_head, step,
    K_RING: gl.constexpr, V_RING: gl.constexpr, RATIO: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Copies every block of a walk, in the order in which the consumers take them: those that need masking, then the
    full ones, but at least one. Returns the next step."""
    _fill_block(inputs, rings, batch, kv_head, first_block_of(walk, RATIO, LISTED), step, K_RING, V_RING)
    step += 1
    for masked in range(1, masked_count(walk)):
        block = masked_block(walk, masked, RATIO, LISTED)
        _fill_block(inputs, rings, batch, kv_head, block, step, K_RING, V_RING)
        step += 1
    for run in range(0, run_count(walk)):
        start, end = run_bounds(walk, run, RATIO, LISTED)
        if (masked_count(walk) == 0) & (run == 0):
            start += 1  # the tile began with it
        for block in range(start, end):
            _fill_block(inputs, rings, batch, kv_head, block, step, K_RING, V_RING)
            step += 1
    return step


@gluon.jit
def _fill_block(inputs, rings, batch, head, block, step, K_RING: gl.constexpr, V_RING: gl.constexpr):
    """One block of k and one of v."""
    k_descriptor, v_descriptor = inputs
    k_buffers, v_buffers, barriers = rings
    coordinates = [batch, head, block * k_descriptor.block_type.shape[2], 0]
    slot, turn = place(step, k_buffers.shape[0])
    fill(k_descriptor, coordinates, k_buffers.index(slot), barriers, K_RING, slot, turn)
    slot, turn = place(step, v_buffers.shape[0])
    fill(v_descriptor, coordinates, v_buffers.index(slot), barriers, V_RING, slot, turn)


@gluon.jit
def fill_queries(
    inputs, rings, batch, first_head, n_heads, first_query, n_blocks, Q_RING: gl.constexpr, GRAD_RING: gl.constexpr
):
    """Copies so many blocks of queries, from the first on, of one head after another: q with its LSE, and the gradient
    of out with its delta, from among SHIFTS copies of those numbers."""
    q_descriptor, grad_descriptor, lse_descriptor, delta_descriptor = inputs
    q_buffers, grad_buffers, lse_buffers, delta_buffers, barriers = rings
    BLOCK_M: gl.constexpr = q_buffers.shape[1]
    step = 0
    for head in range(first_head, first_head + n_heads):
        for block in range(n_blocks):
            slot, turn = place(step, SLOTS)
            row = first_query + block * BLOCK_M
            shift = row % SHIFTS
            fill_both(
                q_descriptor, [batch, head, row, 0], q_buffers.index(slot),
                lse_descriptor, [batch, head, shift, row - shift], lse_buffers.index(slot),
                barriers, Q_RING, slot, turn,
            )  # fmt: skip
            fill_both(
                grad_descriptor, [batch, head, row, 0], grad_buffers.index(slot),
                delta_descriptor, [batch, head, shift, row - shift], delta_buffers.index(slot),
                barriers, GRAD_RING, slot, turn,
            )  # fmt: skip
            step += 1
