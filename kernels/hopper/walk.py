"""What programs work on: tiles of queries with the key blocks that they visit, or tiles of keys with their queries."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attend.kernels.compat import aggregate
from flash_attend.kernels.mask import KEY, Mask, masks_of_call
from flash_attend.kernels.programs import tile_at
from flash_attend.kernels.schedule import HEADER, Planes, Walk


@gluon.jit
def make_mask(
    VISIBLE, LISTS, stride_batch, stride_head, queries, keys, window_left, window_right, SCHEDULE_N: gl.constexpr,
    MASK: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, HIDES_KEYS: gl.constexpr,
):  # fmt: skip
    """Who may see whom, of no head yet. No dense mask comes here, so that blocks of queries do not matter."""
    planes = Planes(VISIBLE, LISTS, stride_batch, stride_head, 0, gl.cdiv(keys, SCHEDULE_N), 0, SCHEDULE_N)
    return masks_of_call(planes, queries, keys, window_left, window_right, MASK, CAUSAL, LEFT, RIGHT, HIDES_KEYS)


@aggregate
class QueryTile:
    """A tile of queries of one head, and the key blocks that it visits: those that need masking, then the full ones.
    There is always at least one."""

    first_query: gl.tensor
    batch: gl.tensor
    head: gl.tensor
    kv_head: gl.tensor
    mask: Mask
    walk: Walk

    @gluon.jit
    def first_block(self):
        """The first block that needs masking, else the first full one, else block 0, all of which is hidden then."""
        walk = self.walk
        first = walk.full_begin
        if walk.LISTED:
            first = gl.load(walk.line + HEADER, mask=walk.run_count() > 0, other=0) * walk.RATIO
        if walk.masked_count() > 0:
            first = walk.masked_block(0)
        elif walk.first_partial is not None:
            first = self._first_full()
        return first

    @gluon.jit
    def _first_full(self):
        """The first full block of a walk that begins somewhere in its line, block 0 if there is none."""
        first = 0
        n_runs = self.walk.run_count()
        for later in range(0, n_runs):
            start, end = self.walk.run_bounds(n_runs - 1 - later)
            first = gl.where(start < end, start, first)
        return first

    @gluon.jit
    def starts_with(self, run, start, first):
        """Whether the first full block, if that is the tile's `first` one, is that of the run with this start."""
        if self.walk.first_partial is None:
            return run == 0
        else:
            return start == first

    @gluon.jit
    def full_count(self):
        """How many full blocks come after the first block."""
        count = 0
        for run in range(0, self.walk.run_count()):
            start, end = self.walk.run_bounds(run)
            count += gl.maximum(end - start, 0)
        if self.walk.masked_count() == 0:
            count -= 1  # it is one of them
        return count


@aggregate
class QueryTiles:
    """The tiles of queries of all heads."""

    mask: Mask
    heads: gl.tensor
    group: gl.tensor
    heads_total: gl.tensor
    section: gl.tensor
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.jit
    def count(self):
        """How many of them this program takes: every n-th, of n programs."""
        tiles = self.heads_total * gl.cdiv(self.mask.queries, self.BLOCK_M)
        return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))

    @gluon.jit
    def at(self, turn):
        """The turn-th tile of this program."""
        index = gl.program_id(0) + turn * gl.num_programs(0)
        first_query, batch, head = tile_at(
            index, self.mask.queries, self.heads, self.heads_total, self.section, self.BLOCK_M
        )
        mask = self.mask.of_head(batch, head)
        walk = mask.walk_over_keys(first_query, self.BLOCK_M, self.BLOCK_N)
        return QueryTile(first_query, batch, head, head // self.group, mask, walk)


@aggregate
class KeyTile:
    """A tile of keys of one key/value head, and the blocks of queries that visit it, in each head of its group.

    `mask` counts keys from the tile's first one, and queries from that of the first block.
    """

    batch: gl.tensor
    kv_head: gl.tensor
    group: gl.tensor
    first_key: gl.tensor
    first_query: object
    n_blocks: gl.tensor
    n_masked: gl.tensor  # of these blocks, the first ones, need masking
    tail: object  # and those from this one on, unless None
    hides: gl.tensor  # whether some of the keys are hidden, or do not exist
    mask: Mask

    @gluon.jit
    def is_masked(self, block):
        """Whether a block needs masking."""
        masked = block < self.n_masked
        if self.tail is not None:
            masked = masked | (block >= self.tail)
        return masked


@gluon.jit
def key_tile_of_program(mask, heads, group, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The tile of this program, of as many as there are. Under causality the longest come first."""
    tiles = gl.cdiv(mask.keys, BLOCK_N)
    first_key = gl.program_id(0) % tiles * BLOCK_N
    kv_heads = heads // group
    batch = gl.program_id(0) // tiles // kv_heads
    kv_head = gl.program_id(0) // tiles % kv_heads
    mask = mask.of_head(batch, kv_head * group)
    # Queries are counted from the first live one. Those past the end need no hiding: all that is read of them is 0, or
    # an LSE of inf.
    first_query = 0
    if mask.CAUSAL and not (mask.KIND == KEY and mask.left is not None):  # else dead ones may be anywhere
        first_query = first_live_query(mask)
        mask = mask.counted_from(first_query, 0)
    any_key = True
    hides = first_key + BLOCK_N > mask.keys
    if mask.KIND == KEY:
        key = first_key + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0]))
        shown = mask.key_shown(key).to(gl.int32)
        any_key = gl.max(shown, 0) != 0
        hides = gl.min(shown, 0) == 0
    elif mask.left is not None:
        hides = hides | (first_key < mask.first_offset())
    hides_keys = False
    if mask.HIDES_KEYS and (mask.KIND == KEY or not mask.CAUSAL or mask.right is not None):
        hides_keys = hides
    walk = mask.walk_over_queries(first_key, any_key, hides_keys, BLOCK_M, BLOCK_N)
    before = walk.begin * BLOCK_M
    tail = None
    if mask.left is not None:
        tail = walk.full_end - walk.begin
    return KeyTile(
        batch, kv_head, group, first_key, first_query + before, walk.end - walk.begin, walk.full_begin - walk.begin,
        tail, hides, mask.counted_from(before, first_key),
    )  # fmt: skip


@gluon.jit
def first_live_query(mask):
    """The first query that sees a key, as all after it do. Those before it may hold anything."""
    # Each warp looks at all of a block of the schedule: what they find they need not tell each other.
    layout: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
    return mask.first_live_query(gl.arange(0, mask.planes.BLOCK_N, layout=layout))


@gluon.jit
def alive(mask, counts, first_live, row):
    """Which queries see a key: those from `first_live` on. Where they may be anywhere, `counts` tells, how many keys
    the key mask shows up to each; else it is None."""
    if counts is None:
        return row >= first_live
    else:
        line = counts + mask.plane * mask.planes.n_key_blocks * mask.planes.BLOCK_N
        begin = gl.maximum(row + mask.first_offset(), 0)
        end = gl.minimum(row + mask.last_offset() + 1, mask.keys) if mask.CAUSAL else mask.keys
        before = gl.load(line + (begin - 1), mask=(begin > 0) & (begin < end), other=0)
        return gl.load(line + (end - 1 + 0 * row), mask=begin < end, other=0) > before
