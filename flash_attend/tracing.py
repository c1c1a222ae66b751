"""Who else takes part in a call: compilers, transforms, tensor subclasses.

All of torch's private names that the package uses are here, each with its reason, but for what DTensor needs and by
what ranks speak to each other (`messages.py`); `tests/torch/test_private_names.py` says which torch broke one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

__all__ = [
    "Guarded",
    "allow_forward_mode",
    "applied",
    "changes_of",
    "constant_when_compiled",
    "directly",
    "exporting_to_onnx",
    "float32_products",
    "forward_mode",
    "has_autocast",
    "innermost_forward_mode",
    "jit_traced",
    "known",
    "lazy",
    "mapped",
    "modes_of_functions",
    "pushed",
    "readable",
    "settled",
    "sharded",
    "tangent_of",
    "traced",
    "transformed",
    "undisturbed",
    "watched",
    "with_tangent",
]

_F = TypeVar("_F", bound=Callable)
_T = TypeVar("_T")

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def constant_when_compiled(function: _F) -> _F:
    """Lets torch.compile call `function` while it traces, and put the result into its graph as a constant.

    What `torch.compiler.assume_constant_result` does, but that one imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def jit_traced() -> bool:
    """Whether torch.jit.trace is recording: `torch.jit.is_tracing`, in one call instead of three."""
    return torch._C._get_tracing_state() is not None


def float32_products() -> str:
    """`torch.backends.cuda.matmul.fp32_precision`, without the attributes that do not exist on the way to it: in a
    third of the time."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul")


@constant_when_compiled
def has_autocast(device_type: str) -> bool:
    """Whether autocast knows this type of device. The compiler of torch 2.10 cannot trace the question itself."""
    return device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)


def traced(*tensors: Tensor | None) -> bool:
    """Whether the call is being compiled or exported, or a tensor is of a class that sees operators: fake, functional,
    DTensor."""
    return torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors))


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is recording, which knows torch's own operators alone."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def sharded(*tensors: Tensor | None) -> bool:
    """Whether a tensor is a DTensor. Where nobody has imported their module, which takes a second, there are none."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


@constant_when_compiled
def transformed() -> bool:
    """Whether a transform of torch.func is on. No public function tells."""
    return torch._C._are_functorch_transforms_active()


@constant_when_compiled
def forward_mode() -> bool:
    """Whether derivatives are pushed forward, by torch.autograd.forward_ad, torch.func.jvp or what builds on them. No
    public function tells."""
    duals = forward_ad._current_level >= 0
    return torch._C._is_fwd_grad_enabled() and (duals or TransformType.Jvp in _transforms())


def _transforms() -> list[TransformType]:
    """Those of torch.func that are on, the innermost last. No public function tells."""
    return [level.key() for level in get_interpreter_stack() or ()]


def innermost_forward_mode() -> Literal["none", "alone", "again", "mapped", "outside"]:
    """Where `tangent_of` has the tangents of tensors, if they have any: nowhere ("none"); here ("alone"); here, of
    tensors that may have others in another forward mode ("again"); where the rules of torch.vmap lead ("mapped");
    outside of another transform, so that nobody can tell ("outside")."""
    if not torch._C._is_fwd_grad_enabled():
        return "none"
    levels = _transforms()
    if not levels:  # dual numbers may be: a program that was compiled does not say
        return "alone"
    if levels[-1] == TransformType.Jvp:
        return "alone" if levels.count(TransformType.Jvp) == 1 else "again"
    if TransformType.Jvp not in levels and forward_ad._current_level < 0:
        return "none"
    return "mapped" if levels[-1] == TransformType.Vmap else "outside"


def pushed(*tensors: Tensor | None) -> bool:
    """Whether a tensor has a tangent, or may have one that nobody can see."""
    innermost = innermost_forward_mode()
    if innermost in ("alone", "again"):
        return any(x is not None and tangent_of(x)[1] is not None for x in tensors)
    return innermost != "none"


def tangent_of(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor without its tangent, and that. Of level 0, the only one that there is: a program that was compiled knows
    no other, and torch.func makes levels of its own."""
    if not tensor.is_floating_point():
        return tensor, None
    primal, tangent = forward_ad.unpack_dual(tensor, level=0)
    return primal, tangent


def with_tangent(tensor: Tensor, tangent: Tensor) -> Tensor:
    """A tensor with a tangent, as the innermost forward mode has it."""
    return forward_ad.make_dual(tensor, tangent, level=0)


def allow_forward_mode(allowed: bool) -> AbstractContextManager:
    """Within this context derivatives are pushed forward where forward mode is on, or are not. No public function does
    it."""
    return forward_ad._set_fwd_grad_enabled(allowed)


def changes_of(tensor: Tensor) -> int | None:
    """How often torch knows a tensor to have been changed; None where it does not count, in what inference mode made.
    No public name tells."""
    return None if tensor.is_inference() else tensor._version


def mapped(*tensors: Tensor | None) -> bool:
    """Whether a tensor is mapped over as `torch.autograd.grad(..., is_grads_batched=True)` does it: apart from
    torch.func, and with no rule for operators like ours. No public function tells."""
    for tensor in tensors:  # noqa: SIM110  as in `lazy`
        if tensor is not None and is_legacy_batchedtensor(tensor):
            return True
    return False


def modes_of_functions() -> list[TorchFunctionMode]:
    """The modes of torch functions that this thread is in. No public function tells."""
    return _get_current_function_mode_stack()


def watched() -> bool:
    """Whether forward mode, a transform of torch.func or a dispatch mode is on, which deal with operators. Of dispatch
    modes no public function tells."""
    duals = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    return duals or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def undisturbed(*tensors: Tensor | None) -> bool:
    """Whether nobody else takes part: neither a compiler, nor torch.jit.trace, nor autocast, nor whoever `watched`
    finds, nor a tensor of a class of its own. All of it at once takes a third of the time."""
    return not (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, tensors))
        or torch._C._get_tracing_state() is not None
        or torch._C._is_any_autocast_enabled()  # public functions ask for one type of device at a time
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


class Guarded(Generic[_T]):
    """What was found for tensors, to be found again with tensors such as those, in one call instead of 35: of the same
    classes, dtypes, devices, sizes and strides, with a gradient or without, and where the same transforms, modes,
    autocast and torch.jit.trace take part, and negated and zero tensors; where gradients are recorded or not, and
    algorithms are to be deterministic or not; never where there may be dual numbers. Compilers, and how float32 is
    multiplied, are to be asked about beside it. It holds no tensor, and knows a few kinds of them.

    That is what torch.compile checks inputs of its graphs by, and what torch is set to, and no public name gives it.
    Without it nothing is found.
    """

    MOST = 4

    def __init__(self) -> None:
        self._found: list[tuple[int, Callable[[], bool], Callable[..., bool], _T]] = []

    def find(self, *tensors: Tensor) -> _T | None:
        """What was kept for such tensors, last where there are several; None where nothing was."""
        if forward_ad._current_level >= 0:
            return None
        try:
            for count, as_set, alike, found in self._found:
                if count == len(tensors) and as_set() and alike(*tensors):
                    return found
        except RuntimeError:  # torch raises where it is set to what contradicts itself
            pass
        return None

    def keep(self, found: _T, *tensors: Tensor) -> None:
        """For tensors of which none comes twice."""
        try:
            from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards

            sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
            alike = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[arg-type]
            as_set = GlobalStateGuard().check
        except (ImportError, TypeError, SystemError, RuntimeError):
            return
        if alike(*tensors):
            self._found = [(len(tensors), as_set, alike, found), *self._found[: self.MOST - 1]]


def readable(*tensors: Tensor) -> bool:
    """Whether the values of tensors can be looked at, and without waiting for a device."""
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)) or watched():
        return False
    for tensor in tensors:  # noqa: SIM110  as in `lazy`
        if not tensor.is_cpu or is_legacy_batchedtensor(tensor):
            return False
    return True


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, also where a level of torch.func runs an operator: in there apply would look for
    that level, and find no rule."""
    front = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    if not (transformed() and torch._C._dispatch_tls_is_dispatch_key_excluded(front)):
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return _of_one_level(function).apply(*arguments)  # type: ignore[attr-defined]


@cache
def _of_one_level(function: type[torch.autograd.Function]) -> type[_SingleLevelFunction]:
    """The same without a look for transforms: what torch.func itself makes of a function for one of its levels."""
    rules = {name: staticmethod(getattr(function, name)) for name in ("forward", "setup_context", "backward", "jvp")}
    return type(function.__name__, (_SingleLevelFunction,), rules)


def directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` where no transform of torch.func is on, without looking for one: 5 of 21 microseconds."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def known(condition: bool | torch.SymBool) -> bool:
    """Whether what was asked of lengths holds, of all that a tracer's symbols may stand for."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def lazy(*tensors: Tensor | None) -> bool:
    """Whether memory does not hold what a tensor stands for: its negative, or zeros, for which torch's derivatives make
    tensors without memory. Of those no public name tells."""
    for tensor in tensors:  # noqa: SIM110  in a third of the time
        if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()):
            return True
    return False


def settled(tensor: Tensor | None) -> Tensor | None:
    """The same tensor in memory."""
    if tensor is None or not tensor._is_zerotensor():
        return tensor if tensor is None else tensor.resolve_neg()
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) + tensor
