"""What the package takes from torch beside its public names: that it is there, and does what is relied on.

A failure here says which torch took something away; the places that use it are in `flash_attend/tracing.py`,
but for operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attend import efficient, tracing

X = torch.ones(2)


def seen_in(transform: Callable, ask: Callable[[], object]) -> list[object]:
    """What `ask` says without a transform of torch.func, and inside it."""
    found = [ask()]

    def note(x: Tensor) -> Tensor:
        found.append(ask())
        return x.sum()

    transform(note)(X)
    return found


def in_dual_level(function: Callable) -> Callable:
    def dual(x: Tensor) -> None:
        with forward_ad.dual_level():
            function(x)

    return dual


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def in_a_mode(function: Callable) -> Callable:
    def with_mode(x: Tensor) -> None:
        with Passing():
            function(x)

    return with_mode


def jvp(function: Callable) -> Callable:
    return lambda x: torch.func.jvp(function, (x,), (x,))


def transforms() -> list[object]:
    return [*seen_in(torch.func.grad, tracing.transformed), *seen_in(torch.vmap, tracing.transformed)]


def forward_modes() -> list[object]:
    ways = (torch.func.grad, jvp, in_dual_level)
    return [seen_in(way, tracing.forward_mode)[1] for way in ways]


def allowed() -> list[object]:
    """What is asked of dual numbers where forward mode is turned off, and on again."""

    def ask() -> list[object]:
        with tracing.allow_forward_mode(False):
            off = [tracing.forward_mode(), tracing.watched(), tracing.innermost_forward_mode()]
            with tracing.allow_forward_mode(True):
                return [*off, tracing.forward_mode()]

    return seen_in(in_dual_level, ask)[1]


def watchers() -> list[object]:
    ways = (torch.func.grad, torch.vmap, jvp, in_dual_level, in_a_mode, lambda f: f)
    return [seen_in(way, tracing.watched)[1] for way in ways]


def modes_of_functions() -> list[object]:
    outside = tracing.modes_of_functions()
    with BaseTorchFunctionMode() as mode:
        return [outside == [], tracing.modes_of_functions() == [mode]]


def constants() -> list[object]:
    """A function that the compiler could not trace, in a graph without breaks."""

    @tracing.constant_when_compiled
    def host_work() -> int:
        return len(open(__file__).readlines()) > 0

    compiled = torch.compile(lambda x: x + host_work(), backend="eager", fullgraph=True)
    return compiled(X).tolist()


def direct_calls() -> list[object]:
    """The engine calls forward and backward, with what is kept between them."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor * ctx.saved_tensors[0], None

    x = X.clone().requires_grad_()
    return torch.autograd.grad(tracing.directly(Double)(x, 3.0).sum(), x)[0].tolist()


def one_level() -> list[object]:
    """A function of the same rules that looks for no transform."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = 2.0

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor

    x, looked = X.clone().requires_grad_(), []
    with mock.patch.object(torch._C, "_are_functorch_transforms_active", lambda: looked.append(True) or False):
        found = torch.autograd.grad(tracing._of_one_level(Double).apply(x).sum(), x)[0].tolist()
    return [*found, *looked]


def mapped() -> list[object]:
    found = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(tracing.mapped(grad))
            return grad

    x = X.clone().requires_grad_()
    for batched in (False, True):
        torch.autograd.grad(Noting.apply(x), x, torch.ones(2, 2) if batched else X, is_grads_batched=batched)
    return found


def jit_traces() -> list[object]:
    found = [tracing.jit_traced()]

    def note(x: Tensor) -> Tensor:
        found.append(tracing.jit_traced())
        return x

    torch.jit.trace(note, X, check_trace=False)
    return found


def zeros() -> list[object]:
    none = torch._efficientzerotensor((2,))
    return [tracing.lazy(torch.zeros(2), none), tracing.lazy(torch.zeros(2)), tracing.settled(none).data_ptr() != 0]


def precisions() -> list[object]:
    before, found = torch.backends.cuda.matmul.fp32_precision, []
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            found.append(tracing.float32_products())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return found


def guards() -> list[object]:
    """Whether a guard finds what was kept for `X`: with such a tensor, with others, and where others take part."""
    guarded: tracing.Guarded[str] = tracing.Guarded()
    guarded.keep("found", X, X.clone())
    guarded.keep("nothing", X, X)
    found = [guarded.find(X, X.clone()), guarded.find(X, X), guarded.find(X)]
    others = (X.double(), X[:1], X.to("meta"), torch.ones(4)[::2], X.clone().requires_grad_(), torch.nn.Parameter(X))
    found += [guarded.find(other, X) for other in (*others, torch._neg_view(X), torch._efficientzerotensor((2,)))]
    traced = lambda function: partial(torch.jit.trace, function, check_trace=False)  # noqa: E731
    ways = (torch.func.grad, torch.vmap, jvp, in_a_mode, traced)
    found += [seen_in(way, lambda: guarded.find(X, X.clone()))[1] for way in ways]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(guarded.find(X, X.clone()))
    with torch.inference_mode():
        found.append(guarded.find(X, torch.ones(2)))
    found.append(seen_in(in_dual_level, lambda: guarded.find(X, X.clone()))[1])
    with torch.no_grad():
        found.append(guarded.find(X, X.clone()))
    torch.use_deterministic_algorithms(True)
    try:
        found.append(guarded.find(X, X.clone()))
    finally:
        torch.use_deterministic_algorithms(False)
    return [*found, guarded.find(X, X.clone())]


def operators() -> list[object]:
    """The arguments of torch's attention on a GPU in their order, those by keyword behind a star."""
    found: list[object] = []
    for operator in (efficient.FORWARD, efficient.BACKWARD):
        arguments = operator._schema.arguments
        found.append(" ".join(one.name for one in arguments if not one.kwarg_only))
        by_keyword = {one.name for one in arguments if one.kwarg_only}
        found.append(by_keyword >= {"scale", *(["num_splits_key"] * (operator is efficient.BACKWARD))})
    return found


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield


RELIED_ON: dict[str, tuple[Callable[[], list], list]] = {
    "torch._C._are_functorch_transforms_active": (transforms, [False, True, False, True]),
    "torch._C._functorch.get_interpreter_stack, forward_ad._current_level": (forward_modes, [False, True, True]),
    "forward_ad._set_fwd_grad_enabled, torch._C._is_fwd_grad_enabled": (allowed, [False, False, "none", True]),
    "torch._C._get_tracing_state": (jit_traces, [False, True]),
    "torch._C._len_torch_dispatch_stack": (watchers, [True, True, True, True, True, False]),
    "torch.overrides._get_current_function_mode_stack": (modes_of_functions, [True, True]),
    "torch._C._functorch.is_legacy_batchedtensor": (mapped, [False, True]),
    "the attribute _dynamo_marked_constant": (constants, [2.0, 2.0]),
    "the apply that torch.autograd.Function inherits": (direct_calls, [3.0, 3.0]),
    "torch.autograd.function._SingleLevelFunction": (one_level, [2.0, 2.0]),
    "torch._C._get_fp32_precision_getter": (precisions, ["tf32", "ieee"]),
    "Tensor._is_zerotensor": (zeros, [True, False, True]),
    "torch.ops.aten._efficient_attention_forward, _backward": (
        operators,
        [
            "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type"
            " compute_log_sumexp",
            True,
            "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p"
            " philox_seed philox_offset custom_mask_type bias_requires_grad",
            True,
        ],
    ),
    "torch._C._dynamo.guards.TensorGuards, GlobalStateGuard": (
        guards,
        ["found", None, None, *[None] * 8, *[None] * 5, None, None, *[None] * 3, "found"],
    ),
}


@pytest.mark.parametrize("name", RELIED_ON)
def test_torch_still_has(name: str) -> None:
    ask, expected = RELIED_ON[name]
    try:
        found = ask()
    except Exception as error:
        pytest.fail(f"torch {torch.__version__} has no {name}, or not as it was: {type(error).__name__}: {error}")
    assert found == expected, f"in torch {torch.__version__}, {name} does not say what it said"
