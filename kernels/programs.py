"""Which tile a program takes."""

import triton
import triton.language as tl


@triton.jit
def tile_at(index, length, heads, heads_total, section, SIZE: tl.constexpr):
    """First position, batch and head of the `index`-th tile of `SIZE` positions.

    Sections of so many heads follow each other, which fit into the cache together with all that their tiles read. In a
    section the last tiles of all heads come first, which under causality are the longest for queries: then none of them
    is left running at the end.
    """
    tiles = tl.cdiv(length, SIZE)
    first_head = index // (section * tiles) * section
    in_section = index % (section * tiles)
    heads_here = tl.minimum(section, heads_total - first_head)
    batch_head = first_head + in_section % heads_here
    return (tiles - 1 - in_section // heads_here) * SIZE, batch_head // heads, batch_head % heads


@triton.jit
def tile_of_program(length, heads, section, SIZE: tl.constexpr, LAST_FIRST: tl.constexpr = True):
    """`tile_at` for this program, of as many as there are tiles. Or the first tiles first: the longest for keys."""
    tiles = tl.cdiv(length, SIZE)
    heads_total = tl.num_programs(0) // tiles
    first, batch, head = tile_at(tl.program_id(0), length, heads, heads_total, section, SIZE)
    if not LAST_FIRST:
        first = (tiles - 1) * SIZE - first
    return first, batch, head


@triton.jit
def part_of_program(length, heads, section, parts, SIZE: tl.constexpr):
    """The tile of this program, as `tile_of_program` has them, and which of so many parts of its work it does. The
    heads of a group, which read the same, run at the same time: the same part of all tiles comes first."""
    programs = tl.num_programs(0) // parts
    index = tl.program_id(0)
    heads_total = programs // tl.cdiv(length, SIZE)
    first, batch, head = tile_at(index % programs, length, heads, heads_total, section, SIZE)
    return first, batch, head, index // programs
