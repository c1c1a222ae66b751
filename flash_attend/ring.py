"""Attention over keys that the ranks of a group share: each sends its own to those that see some of them, and takes in
turn what others send, one transfer under way while what came before is attended to.

At step `t` a rank has the keys of the one `t` places before it, and its own go to the one `t` places after it. Nobody
hands on what is not its own: keys do not come where nobody sees them, and what a rank finds of their gradients goes
straight to who holds them, rounded once. Each shard is attended to by a backend, a block at a time, and merged by
(out, lse). The backward gets weights from the merged lse, so that nothing of another rank's is kept.

As operators, of which a compiler sees no more than their schema: that of `ops.py`, and the name of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from flash_attend.backends import Functions
from flash_attend.dispatch import choose
from flash_attend.functional import warn_once
from flash_attend.generation import generation
from flash_attend.messages import Exchange, agree, group_named
from flash_attend.operands import Operands
from flash_attend.ops import INPUTS, OUTPUTS, Options, latest, spec_of
from flash_attend.sequence import Block, Layout, Shards, blocks_between
from flash_attend.spec import CALLS_KEPT, AttentionSpec, bias_kind
from flash_attend.target import DeviceTarget

__all__ = ["FORWARD", "ring_options"]

Keys = tuple[Tensor, Tensor, Tensor | None]  # k, v and the key mask of a shard


def ring_options(operands: Operands, spec: AttentionSpec, layout: Layout, backend: str, needed: Sequence[str]) -> str:
    """The options of a call, of which gradients of some of INPUTS are `needed`, as `Options` reads them. Which backward
    goes with a backend is found for each block."""
    left, right = ["" if end is None else str(int(end)) for end in spec.window]
    present = ",".join([name for name, tensor in zip(Operands._fields, operands, strict=True) if tensor is not None])
    served = f"backend={backend} backward=separate precision={spec.precision} layout={layout}"
    flags = f"causal={int(spec.causal)} deterministic={int(spec.deterministic)} return_lse=1"
    return f"{served} {flags} window={left},{right} operands={present} needed={','.join(needed)}"


class _Call(NamedTuple):
    """A call on this rank, from what an operator is given."""

    operands: Operands
    spec: AttentionSpec  # of this rank's shards, as if they were whole sequences
    options: Options
    shards: Shards
    group: ProcessGroup
    rank: int

    @staticmethod
    def of(tensors: Sequence[Tensor], numbers: Sequence[float], text: str, name: str) -> _Call:
        options, group = Options.read(text), group_named(name)
        operands = options.operands_of([tensor.resolve_neg() for tensor in tensors])
        mask = None if operands.mask is None else operands.mask.contiguous()
        operands = operands._replace(k=operands.k.contiguous(), v=operands.v.contiguous(), mask=mask)
        spec = spec_of(operands, numbers, options)
        (left, right), offset = options.window, group.size() * spec.offset
        right = 0 if options.causal else right
        shards = Shards(
            cast(Layout, options.layout),
            group.size(),
            spec.queries,
            spec.keys,
            lowest=None if left is None else offset - left,
            highest=None if right is None else offset + right,
            apart=spec.dropout_p > 0,
            sided=spec.alibi,
        )
        return _Call(operands, spec, options, shards, group, dist.get_rank(group))

    @property
    def facts(self) -> tuple[tuple[str, Any], ...]:
        """What every rank has to say alike. Which backend serves is its own affair."""
        spec = self.spec
        shapes = [(name, None if x is None else tuple(x.shape)) for name, x in self.operands._asdict().items()]
        numbers = dict(scale=spec.scale, dropout_p=spec.dropout_p, softcap=spec.softcap, dtype=spec.dtype)
        options = self.options._replace(backend="")._asdict()
        return (("way", "ring"), *shapes, *numbers.items(), *options.items())

    @property
    def needed(self) -> tuple[bool, ...]:
        """Of which of q, k and v a gradient is needed."""
        return tuple(name in self.options.needed for name in INPUTS[:3])

    def peers(self, step: int) -> tuple[int, int]:
        """To which rank this one's keys go at a step, and of which it has the keys."""
        return (self.rank + step) % self.shards.ranks, (self.rank - step) % self.shards.ranks

    def blocks(self, step: int) -> tuple[Block, ...]:
        """What is computed at a step."""
        return blocks_between(self.shards, self.rank, self.peers(step)[1])

    def gives(self, step: int) -> bool:
        """Whether the rank to which keys could go at a step sees any of them."""
        return bool(blocks_between(self.shards, self.peers(step)[0], self.rank))

    def keys_in_turn(self) -> Iterator[tuple[int, Keys]]:
        """Each step with the keys that it takes; at those without blocks, any."""
        _, k, v, mask, *_ = self.operands
        own = [k, v] if mask is None else [k, v, mask.view(torch.uint8)]
        coming = self._fetch(1, own)
        yield 0, (k, v, mask)
        for step in range(1, self.shards.ranks):
            k, v, *masks = coming.arrived() or own
            coming = self._fetch(step + 1, own)
            yield step, (k, v, masks[0].view(torch.bool) if masks else None)

    def _fetch(self, step: int, own: Sequence[Tensor]) -> Exchange:
        within = step < self.shards.ranks
        to, source = self.peers(step)
        coming = [torch.empty_like(x) for x in own] if within and self.blocks(step) else ()
        return Exchange(self.group, own if within and self.gives(step) else (), to, coming, source)


# ---------------------------------------------------------------------------------------------------------------------
# A block
# ---------------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A block as a call of a backend."""

    operands: Operands
    spec: AttentionSpec
    needed: tuple[bool, ...]
    shift: Tensor | None  # (b|1, h, i): what the scores of a row lack, and so its lse
    functions: Functions
    tiles: Any

    @staticmethod
    def of(call: _Call, keys: Keys, block: Block) -> _Part:
        at, of_keys = slice(*block.rows), slice(*block.keys)
        k, v, mask = (x if x is None else x[..., of_keys] if x is keys[2] else x[:, :, of_keys] for x in keys)
        seed, slopes = call.operands.seed, call.operands.alibi_slopes
        bias = shift = None
        if slopes is not None and block.side:
            bias, shift = _one_sided(slopes, block, call)
            slopes = None
        left, right = block.window
        spec = replace(
            call.spec,
            queries=block.rows[1] - block.rows[0],
            keys=block.keys[1] - block.keys[0],
            causal=right == 0,
            window=(left, right or None),
            bias=None if bias is None else bias_kind(bias),
            alibi=slopes is not None,
            sinks=False,
            origin=block.origin if seed is not None else None,
        )
        operands = Operands(call.operands.q[:, :, at], cast(Tensor, k), cast(Tensor, v), mask, seed, bias, slopes)
        needed = call.needed if bias is None else (*call.needed, False, False)
        target = DeviceTarget.of(operands.q.device)
        return _Part(operands, spec, needed, shift, *_chosen(spec, target, call.options.backend, needed, generation()))


@lru_cache(maxsize=CALLS_KEPT)
def _chosen(
    spec: AttentionSpec, target: DeviceTarget, backend: str, needed: tuple[bool, ...], generation: object
) -> tuple[Functions, Any]:
    plan = choose(spec, target, backend, needed)
    if plan.warning:
        warn_once(plan.warning)
    functions = plan.backend.load()
    return functions, functions.tiles(spec, target, plan.backward)


def _one_sided(slopes: Tensor, block: Block, call: _Call) -> tuple[Tensor, Tensor]:
    """ALiBi where all keys of a block lie on one side of its rows' places: a bias of the keys alone, by how far they
    are from the nearest, `(b|1, h, 1, j)`; and what each row adds for how far it is from that one, `(b|1, h, i)`."""
    (first_row, last_row), (first_key, last_key), (query, key) = block.rows, block.keys, block.origin
    keys = torch.arange(key, key + last_key - first_key, device=slopes.device)
    rows = torch.arange(query, query + last_row - first_row, device=slopes.device) + call.shards.offset
    nearest = key if block.side > 0 else key + last_key - first_key - 1
    slopes = -slopes.to(call.spec.accumulator_dtype)[..., None]
    return (slopes * (keys - nearest).abs())[:, :, None], slopes * (rows - nearest).abs()


# ---------------------------------------------------------------------------------------------------------------------
# Sums over what came
# ---------------------------------------------------------------------------------------------------------------------


class _Merged:
    """Attention over the keys that came so far."""

    def __init__(self, call: _Call) -> None:
        spec, dtype = call.spec, call.spec.accumulator_dtype
        shape = spec.batch, spec.heads, spec.queries, spec.value_dim
        self.out = call.operands.q.new_zeros(shape, dtype=dtype)
        self.lse = call.operands.q.new_full(shape[:3], -torch.inf, dtype=dtype)

    def add(self, block: Block, out: Tensor, lse: Tensor) -> None:
        """Takes in what the rows of a block found."""
        rows = slice(*block.rows)
        before, total = self.lse[:, :, rows], torch.logaddexp(self.lse[:, :, rows], lse)
        known = _finite(total)
        self.out[:, :, rows].mul_((before - known).exp()[..., None]).addcmul_(out, (lse - known).exp()[..., None])
        before.copy_(total)

    def add_sinks(self, sinks: Tensor) -> None:
        """Takes in what counts as one more score, without a value, of each row that sees a key."""
        total = torch.logaddexp(self.lse, sinks.to(self.lse.dtype)[:, None])
        self.out.mul_((self.lse - _finite(total)).exp()[..., None])
        self.lse = torch.where(self.lse == -torch.inf, self.lse, total)


def _finite(lse: Tensor) -> Tensor:
    """The lse with 0 for rows that see nothing, against which all of theirs weighs 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


class _Gradients:
    """Those of this rank's q, k and v, where they are needed, from what it finds and from what others send."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._coming: Exchange | None = None
        dtype = call.spec.accumulator_dtype
        q, k, v = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) if need else None
            for x, need in zip(call.operands[:3], call.needed, strict=True)
        )
        self.of_q, self.of_keys = q, [x for x in (k, v) if x is not None]

    def empty(self) -> list[Tensor]:
        """Zeros, for what is found of another rank's keys."""
        return [torch.zeros_like(x) for x in self.of_keys]

    def send(self, step: int, found: Sequence[Tensor]) -> None:
        """Sends what a step found to who holds its keys, while what others found of this rank's comes."""
        (to, source), dtype = self._call.peers(step), self._call.spec.dtype
        sent = [x.to(dtype) for x in found] if self._call.blocks(step) else ()
        coming = [torch.empty_like(x, dtype=dtype) for x in self.of_keys] if self._call.gives(step) else ()
        self.settle(Exchange(self._call.group, sent, source, coming, to))

    def settle(self, following: Exchange | None = None) -> None:
        """Adds what came last; then another exchange is under way, or none."""
        if self._coming is not None:
            for total, x in zip(self.of_keys, self._coming.arrived(), strict=False):
                total.add_(x)
        self._coming = following


# ---------------------------------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------------------------------


def forward(tensors: Sequence[Tensor], numbers: Sequence[float], text: str, group: str) -> list[Tensor]:
    """`[out, lse]` of this rank's queries over all keys of the group."""
    call = _Call.of(tensors, numbers, text, group)
    agree(group, call.facts)
    merged = _Merged(call)
    with torch.no_grad():
        for step, keys in call.keys_in_turn():
            for block in call.blocks(step):
                part = _Part.of(call, keys, block)
                out, lse, _ = part.functions.forward(part.operands, part.spec, part.tiles)
                merged.add(block, out, lse if part.shift is None else lse + part.shift)
        if call.operands.sinks is not None:
            merged.add_sinks(call.operands.sinks)
    return [merged.out.to(call.spec.dtype), merged.lse]


def like_forward(tensors: Sequence[Tensor], numbers: Sequence[float], text: str, group: str) -> list[Tensor]:
    """What `forward` gives, uninitialised."""
    options = Options.read(text)
    operands = options.operands_of(tensors)
    spec = spec_of(operands, numbers, options)
    out = operands.q.new_empty(spec.batch, spec.heads, spec.queries, spec.value_dim)
    return [out, out.new_empty(out.shape[:3], dtype=spec.accumulator_dtype)]


def backward(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[float],
    text: str,
    group: str,
) -> list[Tensor]:
    """The gradients of those of INPUTS that are needed; `outputs` are those of `forward`."""
    call = _Call.of(tensors, numbers, text, group)
    given = dict(zip(call.options.grads, grads, strict=True))
    (out, lse), grad_out, grad_lse = outputs, given.get("out"), given.get("lse")
    total = _Gradients(call)
    with torch.no_grad():
        for step, keys in call.keys_in_turn():
            found = total.empty() if step else total.of_keys
            for block in call.blocks(step):
                part = _Part.of(call, keys, block)
                at, of_keys = slice(*block.rows), slice(*block.keys)
                of_rows = (x if x is None else x[:, :, at] for x in (grad_out, grad_lse))
                statistics = out[:, :, at], lse[:, :, at] - (0.0 if part.shift is None else part.shift)
                read = *of_rows, part.operands, *statistics, part.spec, part.tiles, part.needed
                of_q, *of_kv = part.functions.backward_of_part(*read)[:3]
                if total.of_q is not None:
                    total.of_q[:, :, at].add_(of_q)
                for whole, x in zip(found, compress(of_kv, call.needed[1:]), strict=True):
                    whole[:, :, of_keys].add_(x)
            if step and found:
                total.send(step, found)
        total.settle()
        made = [x for x in (total.of_q, *total.of_keys) if x is not None]
        made = [x.to(call.spec.dtype) for x in made]
        if "sinks" in call.options.needed:
            made.append(_gradient_of_sinks(grad_out, grad_lse, cast(Tensor, call.operands.sinks), out, lse))
    return made


def _gradient_of_sinks(
    grad_out: Tensor | None, grad_lse: Tensor | None, sinks: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """`(h,)`, summed over this rank's queries."""
    weights = (sinks.to(lse.dtype)[:, None] - _finite(lse)).exp().masked_fill(lse == -torch.inf, 0.0)  # (b, h, i)
    delta = torch.zeros_like(lse) if grad_out is None else (out.to(lse.dtype) * grad_out).sum(dim=-1)
    delta = delta if grad_lse is None else delta - grad_lse
    return -(weights * delta).sum(dim=(0, 2)).to(sinks.dtype)


def like_backward(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[float],
    text: str,
    group: str,
) -> list[Tensor]:
    """What `backward` gives, uninitialised."""
    options = Options.read(text)
    named = options.operands_of(tensors)._asdict()
    return [named[name].new_empty(named[name].shape) for name in INPUTS if name in options.needed]


def keep_for_gradients(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    operands, *ctx.others = inputs
    ctx.save_for_backward(*operands, *output)
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    numbers, text, group = ctx.others
    options = Options.read(text)
    names = options.operands
    operands, outputs = ctx.saved_tensors[: len(names)], ctx.saved_tensors[len(names) :]
    given = {name: grad for name, grad in zip(OUTPUTS, grads, strict=True) if grad is not None}
    text = f"{text} grads={','.join(given)}"
    found = BACKWARD([*given.values()], operands, outputs, numbers, text, group)
    by_name = dict(zip([name for name in INPUTS if name in options.needed], found, strict=True))
    return [by_name.get(name) for name in names], None, None, None


_SCHEMAS = {
    "forward": "(Tensor[] operands, float[] numbers, str options, str group) -> Tensor[]",
    "backward": "(Tensor[] grads, Tensor[] operands, Tensor[] outputs, float[] numbers, str options, str group)"
    " -> Tensor[]",
}
if not hasattr(torch.ops.flash_attend, "ring_forward"):
    for _name, _schema in _SCHEMAS.items():
        _operator = f"flash_attend::ring_{_name}"
        torch.library.define(_operator, _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        torch.library.impl(_operator, "default", latest(__name__, _name))
        torch.library.register_fake(_operator, latest(__name__, f"like_{_name}"))
    torch.library.register_autograd(
        "flash_attend::ring_forward",
        latest(__name__, "gradients"),
        setup_context=latest(__name__, "keep_for_gradients"),
    )

FORWARD = torch.ops.flash_attend.ring_forward.default
BACKWARD = torch.ops.flash_attend.ring_backward.default
