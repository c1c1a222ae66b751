"""What follows from a few small tensors on a device, such as where sequences lie: made once for all layers of a model,
and for the backward."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from flash_attend.tracing import changes_of, traced, watched

__all__ = ["derived"]

MOST = 32  # of one tensor

_T = TypeVar("_T")
# Of each tensor by the other tensors, the key and the stream: how often each was changed, who the others are, and what
# was made. It is kept as long as the tensor is there, which it does not hold.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def derived(make: Callable[[], _T], key: Hashable, *tensors: Tensor) -> _T:
    """`make()`, which reads these tensors and depends on `key`, or what it gave before for the same ones, unless torch
    saw one of them change. What it gives is changed by nobody, and shares no memory with them."""
    if traced(*tensors) or watched():
        return make()
    first, *others = tensors
    stream, changes = _stream(first), [changes_of(tensor) for tensor in tensors]
    if stream is None or None in changes:
        return make()
    if (found := _made.get(first)) is None:
        found = _made[first] = {}
    # In inference mode tensors are made that no backward may read.
    named = key, stream, torch.is_inference_mode_enabled(), *map(id, others)
    if named in found:
        of_changes, references, before = found[named]
        if of_changes == changes and all(ref() is other for ref, other in zip(references, others, strict=True)):
            return before
    if len(found) >= MOST:
        found.clear()
    made = make()
    found[named] = changes, [TensorWeakRef(other) for other in others], made
    return made


def _stream(tensor: Tensor) -> int | None:
    """The stream that works on a tensor; None where nothing is kept: on a CPU, whose memory others write to as well,
    and for a graph that is captured, which is to read its tensors anew at each replay."""
    if tensor.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(tensor.device).cuda_stream
