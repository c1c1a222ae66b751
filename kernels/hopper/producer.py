"""What producers copy: the blocks of k and v that a tile of queries visits, or of queries that visit a tile of keys."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attend.kernels.compat import aggregate

SHIFTS = gl.constexpr(4)  # float32 in 16 bytes: along the last dimension a bulk copy begins at a multiple of those


@aggregate
class Inputs:
    """Descriptors of what a producer copies; None, what its kernel does not read by copies."""

    q: object
    k: object
    v: object
    grad: object  # of out
    log2: object  # of `Statistics`
    delta: object


@gluon.jit
def fill_blocks(inputs, shared, tile, step):
    """Copies every block of k and v that a tile of queries visits, in the order in which the consumers take them: those
    that need masking, then the full ones, but at least one. Returns the next step."""
    walk = tile.walk
    first = tile.first_block()
    _fill_block(inputs, shared, tile, first, step)
    step += 1
    for masked in range(1, walk.masked_count()):
        _fill_block(inputs, shared, tile, walk.masked_block(masked), step)
        step += 1
    for run in range(0, walk.run_count()):
        start, end = walk.run_bounds(run)
        if (walk.masked_count() == 0) & tile.starts_with(run, start, first):
            start += 1  # the tile began with it
        for block in range(start, end):
            _fill_block(inputs, shared, tile, block, step)
            step += 1
    return step


@gluon.jit
def _fill_block(inputs, shared, tile, block, step):
    """One block of k and one of v."""
    coordinates = [tile.batch, tile.kv_head, block * inputs.k.block_type.shape[2], 0]
    shared.k.at(step).fill(inputs.k, coordinates)
    shared.v.at(step).fill(inputs.v, coordinates)


@gluon.jit
def fill_queries(inputs, shared, tile):
    """Copies every block of queries that visits a tile of keys, of one head after another: q with its LSE, and the
    gradient of out with its delta, from among SHIFTS copies of those numbers."""
    BLOCK_M: gl.constexpr = inputs.q.block_type.shape[2]
    step = 0
    for head in range(tile.kv_head * tile.group, (tile.kv_head + 1) * tile.group):
        for block in range(tile.n_blocks):
            row = tile.first_query + block * BLOCK_M
            shift = row % SHIFTS
            rows, numbers = [tile.batch, head, row, 0], [tile.batch, head, shift, row - shift]
            shared.q.at(step).fill_both(inputs.q, rows, inputs.log2, numbers)
            shared.grad.at(step).fill_both(inputs.grad, rows, inputs.delta, numbers)
            step += 1
