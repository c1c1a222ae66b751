"""What the ranks of a group say to each other: that they mean the same call, tensors, and what one of them has drawn.

What a compiler has to follow is said by torch's functional collectives, and waited for at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group

from flash_attend.spec import CALLS_KEPT

__all__ = ["Exchange", "agree", "all_gather", "all_to_all", "group_named", "of_first"]

Facts = tuple[tuple[str, Any], ...]  # by name


@lru_cache(maxsize=CALLS_KEPT)
def agree(group: str, facts: Facts) -> None:
    """Raises `ValueError`, on every rank, unless all ranks of a group, given by its name, say the same of a call.

    They are asked once for each kind of calls. A rank that is asked alone, because the others know the kind, waits for
    them until the group's time is out; so do they.
    """
    ranks = group_named(group)
    told: list[Facts] = [()] * ranks.size()
    dist.all_gather_object(told, facts, group=ranks)
    for rank, others in enumerate(told):
        for (name, value), (_, other) in zip(told[0], others, strict=True):
            if value != other:
                found = f"{value} on rank 0 and {other} on rank {rank}"
                raise ValueError(f"{name} must be the same on every rank of the group, got {found}")


def group_named(name: str) -> ProcessGroup:
    """The group whose `group_name` this is: operators are given names."""
    return _resolve_process_group(cast(Any, name))


class Exchange:
    """Tensors on their way to one rank of a group, while others come from another."""

    def __init__(
        self, group: ProcessGroup, sent: Sequence[Tensor], to: int, received: Sequence[Tensor], source: int
    ) -> None:
        self._tensors = sent, received  # kept until they have arrived
        messages = [dist.P2POp(dist.isend, x, group=group, group_peer=to) for x in sent if x.numel()]
        messages += [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in received if x.numel()]
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def arrived(self) -> Sequence[Tensor]:
        """What came, as soon as it did; work that follows on this device waits for it."""
        for work in self._works:
            work.wait()
        return self._tensors[1]


class _AllToAll(torch.autograd.Function):
    """Its gradients go back the way that it came."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(sent: Tensor, group: ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_to_all_single(sent.contiguous(), None, None, group))


def all_to_all(sent: Tensor, group: ProcessGroup) -> Tensor:
    """`(ranks, ...)`, what goes to each rank of a group -> `(ranks, ...)`, what came from each; differentiable."""
    return _AllToAll.apply(sent, group)


def all_gather(shard: Tensor, group: ProcessGroup) -> Tensor:
    """`(...)` -> `(ranks, ...)`, of every rank; differentiable: a shard gets the sum of the gradients that ranks have
    for it. By `all_to_all`, because torch has no name for it that all versions know."""
    return all_to_all(shard.expand(group.size(), *shard.shape), group)


def of_first(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """What the first rank of a group has, on every rank."""
    return collectives.wait_tensor(collectives.broadcast(tensor, 0, group))
