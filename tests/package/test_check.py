"""A variant checks itself before it first serves: `auto` takes what is right and nothing else, and nobody notices."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attend import __main__ as command
from flash_attend import check, explain, flash_attention, marks
from flash_attend.backends import BACKENDS
from flash_attend.check import servable
from flash_attend.small_call import small_call
from flash_attend.spec import MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.testing.budget import TF32Products
from flash_attend.testing.oracle import visible_pairs
from flash_attend.testing.sequences import whole_call
from flash_attend.tracing import constant_when_compiled
from flash_attend.variant import ALL, NONE, Variant, variant_of
from parts import CPU, FAULTS, PART, VARIANT, forget, leave_out_torchs, serve_as_triton, store, with_fault


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path))
    monkeypatch.delenv("FLASH_ATTEND_CHECK", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the einsum path, with a fault, what serves as `triton`."""
    return lambda *fault: serve_as_triton(with_fault(*fault), monkeypatch.setattr, monkeypatch.setitem)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The variants that were checked."""
    found, judge = [], check._judge
    monkeypatch.setattr(check, "_judge", lambda variant, *rest: found.append(str(variant)) or judge(variant, *rest))
    return found


def inputs(**changes) -> list[Tensor]:
    return [torch.ones(1, 2, 5, 8, requires_grad=True, **changes) for _ in range(3)]


def served() -> str:
    return explain(*inputs()).plan.name


# ---------------------------------------------------------------------------------------------------------------------
# What auto takes
# ---------------------------------------------------------------------------------------------------------------------


def test_auto_takes_what_was_right(plant: Callable, checks: list[str]) -> None:
    plant("none")
    assert "not checked here yet" in str(explain(*inputs()))
    assert checks == []
    for _ in range(2):
        flash_attention(*inputs())
        flash_attention(*inputs(), scale=0.1)  # a variant is none of the scale, and none of the lengths
        forget()
    assert checks == [str(VARIANT)]
    assert served() == "triton"
    assert "triton     yes      self-checked: " in str(explain(*inputs()))
    flash_attention(*inputs(), causal=True)
    assert len(checks) == 2
    with torch.no_grad():
        flash_attention(*inputs())  # the same kernels as with gradients
    assert len(checks) == 2


class Coarse(TF32Products):
    """As bfloat16 would: with 7 bits where TF32 has 10."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and args[0].dtype == torch.float32:
            args = tuple(x.bfloat16().float() for x in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("products", "right"), ((TF32Products, True), (Coarse, False)))
def test_tf32_is_held_to_tf32(monkeypatch: pytest.MonkeyPatch, products: type, right: bool) -> None:
    exact = with_fault("none")

    def forward(*given):
        with products():
            return exact.forward(*given)

    def backward(*given):
        with products():
            return exact.backward(*given)

    coarse = exact._replace(forward=forward, backward=backward)
    serve_as_triton(coarse, monkeypatch.setattr, monkeypatch.setitem)
    for kind in (VARIANT.kind, VARIANT.kind._replace(mask="key", causal=True, head_dim=64, value_dim=64)):
        finding = check.check(VARIANT._replace(kind=kind._replace(precision="tf32")), CPU)
        assert finding.right == right, finding.reason
        assert not check.check(VARIANT._replace(kind=kind), CPU).right  # float32-accurate is held to float32


@pytest.mark.parametrize(("fault", "right"), (("none", True), ("wrong", False)))
def test_tangents_are_judged(fault: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a variant of forward mode, which has a name of its own: the fault is in the tangent of out alone."""
    plant, math = FAULTS[fault], BACKENDS["math"].load()

    def push(*given: Any) -> tuple:
        out, lse, out_tangent, *rest = math.tangents(*given)
        return out, lse, *plant(out_tangent, *rest)

    serve_as_triton(math._replace(tangents=push), monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(check, "_tiles_of", lambda *given: None)
    variant = VARIANT._replace(needed=NONE, tangents=ALL)
    assert str(variant).endswith("forward-only tangents-qkv")
    assert check.check(variant, CPU).right == right


def test_one_that_fails_leaves_the_others(plant: Callable) -> None:
    plant("wrong", "backward")
    with torch.no_grad():
        flash_attention(*inputs())
        assert served() == "triton"


def test_a_lack_of_memory_is_no_lasting_fault(plant: Callable, checks: list[str]) -> None:
    plant("no memory")
    for times in (1, 2):
        with pytest.warns(UserWarning, match="OutOfMemoryError"):
            flash_attention(*inputs())
            flash_attention(*inputs(), scale=0.5)
        assert len(checks) == times
        forget()


def test_no_check_trusts(plant: Callable, checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant("wrong")
    with pytest.warns(UserWarning, match="self-check failed"):
        flash_attention(*inputs())
    monkeypatch.setenv("FLASH_ATTEND_CHECK", "0")
    forget()
    assert (flash_attention(*inputs()) > 1).all()  # whatever was found before
    assert (flash_attention(*inputs(), causal=True) > 1).all()
    assert "trusted unchecked" in str(explain(*inputs()))
    assert len(checks) == 1


def test_while_a_graph_is_captured_nothing_is_checked(plant: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("none")
    monkeypatch.setattr(check, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured, and triton .* call it once before"):
        flash_attention(*inputs())
    monkeypatch.setattr(check, "_capturing", lambda device: False)
    flash_attention(*inputs())
    monkeypatch.setattr(check, "_capturing", lambda device: pytest.fail("asked"))
    flash_attention(*inputs(), scale=0.3)


def test_a_check_survives_without_assertions(plant: Callable) -> None:
    """`python -O` leaves assertions out, and a check must not pass for that: none of its words is one."""
    source = Path(importlib.import_module("flash_attend.testing.budget").__file__).read_text()
    judging = source[source.index("def check(self") : source.index("def assert_within_budget")]
    assert "assert " not in judging


# ---------------------------------------------------------------------------------------------------------------------
# Nobody notices
# ---------------------------------------------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """Notes which operators a call runs."""

    seen: list[str]

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def anew_compiled(attend: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(attend, backend="eager", fullgraph=True)


WAYS: dict[str, Callable[[Callable], object]] = {
    "plainly": lambda attend: attend(*inputs()),
    "autocast": lambda attend: torch.autocast("cpu", torch.float16)(attend)(*inputs()),
    "inference mode": lambda attend: torch.inference_mode()(attend)(*inputs()),
    "no grad": lambda attend: torch.no_grad()(attend)(*inputs()),
    "vmap": lambda attend: torch.vmap(attend)(*(torch.ones(2, 1, 2, 5, 8) for _ in range(3))),
    "grad": lambda attend: torch.func.grad(lambda *given: attend(*given).sum())(*(x.detach() for x in inputs())),
    "jvp": lambda attend: torch.func.jvp(attend, *[tuple(x.detach() for x in inputs())] * 2),
    "thread": lambda attend: in_a_thread(lambda: attend(*inputs())),
    "compiled": lambda attend: anew_compiled(attend)(*inputs()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_check_leaves_no_trace(plant: Callable, checks: list[str], way: str) -> None:
    """Wherever a call comes from: the check is done, and was right, and nothing else is as it was not."""
    plant("none")
    state = torch.get_rng_state()
    WAYS[way](flash_attention)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(checks) == 1
    (finding,) = store().findings().values()
    assert finding.right, finding.reason
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_modes_see_nothing_of_a_check(plant: Callable, checks: list[str]) -> None:
    plant("none")
    with FakeTensorMode():
        fake = inputs()
    with Watching() as watching, torch.device("meta"):
        flash_attention(*fake)
        flash_attention(*(torch.ones(1, 2, 5, 8, device="cpu") for _ in range(3)), causal=True)
    assert len(checks) == 2
    assert all(finding.right for finding in store().findings().values())
    assert not {name for name in watching.seen if "randn" in name or "bmm" in name or "double" in name}


def test_a_check_may_wait_where_a_program_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fake of what torch has for CUDA alone; the program's mode is back after it, and after one that raises."""
    mode = ["error"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    for name in ("device", "stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())
    monkeypatch.setattr(check, "_compare", lambda variant, device: mode[-1])
    assert check._on_the_device(VARIANT, torch.device("cuda")) == "default"
    monkeypatch.setattr(check, "_compare", None)
    with pytest.raises(TypeError):
        check._on_the_device(VARIANT, torch.device("cuda"))
    assert mode == ["error", "default", "error", "default", "error"]


def test_deterministic_mode_and_the_default_dtype_stay(plant: Callable) -> None:
    plant("none")
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    try:
        flash_attention(*inputs(dtype=torch.float32))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    (finding,) = store().findings().values()
    assert finding.right, finding.reason


# ---------------------------------------------------------------------------------------------------------------------
# The small call
# ---------------------------------------------------------------------------------------------------------------------

HOPPER = DeviceTarget("cuda", "H100", (9, 0), 232448, 132, "3.7.1")


def some_variants() -> list[Variant]:
    found = [one for one in servable(HOPPER) if one.kind[:3] == ("bfloat16", "ieee", 64)]
    # Of a single query neither a mask nor a bias varies over queries.
    single = [one for one in found if one.kind.mask != "dense" and "ij" not in one.kind.scores]
    single = [one for one in single if not one.kind.sequences]
    decoding = [one._replace(kind=one.kind._replace(one_query=True), negative_scale=True) for one in single]
    packed = [one._replace(packed=True) for one in found if one.grouped and not (one.mask_per_head or one.kind.dropout)]
    return [*found, *decoding, *(one for one in packed if one.kind.mask != "dense")]


def test_a_small_call_is_of_its_variant() -> None:
    """Full and cut tiles both ways, queries that see nothing, NaN in keys that nobody sees, and no other NaN."""
    variants = some_variants()
    assert {variant.backend for variant in variants} == {"hopper", "triton", "efficient"}
    for variant in variants:
        call, name = small_call(variant, (16, 32), CPU), str(variant)
        spec, (q, k, v, mask, _, bias, _, _, segments, _) = call.spec, call.poisoned
        assert Variant.read(variant_of(spec, *variant[:2], variant.needed, tangents=variant.tangents)) == variant
        assert [x is not None for x in call.tangents[:3]] == [*(variant.tangents or NONE)], name
        for tangent, operand in zip(call.poisoned_tangents[:3], (q, k, v), strict=True):
            assert tangent is None or torch.equal(tangent.isnan(), operand.isnan()), name
        short = variant.kind.one_query or variant.packed
        assert (spec.keys > 32 and spec.keys % 32 and spec.queries % 16) or short, name
        pairs = visible_pairs(
            spec.batch, spec.heads, spec.queries, spec.keys, mask, spec.causal, CPU, window=spec.window
        )
        if segments is not None:
            lengths = segments[: spec.sequences, 1::2].tolist()
            assert max(i for i, _ in lengths) > 32 and max(j for _, j in lengths) > 32, name
            pairs = whole_call(lengths, q, k, causal=spec.causal, window=spec.window)["mask"].expand_as(pairs)
        hidden = ~pairs.any(dim=2).view(spec.batch, spec.kv_heads, spec.group, spec.keys).any(dim=2)
        poisoned = k.isnan().all(dim=3)
        assert torch.equal(poisoned, v.isnan().all(dim=3)), name
        assert not (poisoned & ~hidden).any(), name
        assert not q.isnan().any(), name
        if mask is not None or segments is not None:
            assert poisoned.any(), name
        if mask is not None or segments is not None or (spec.causal and not short):
            assert not pairs.any(dim=3).all(), name
        full = pairs.unfold(3, 32, 32).unfold(2, spec.queries if short else 16, 16).all(dim=-1).all(dim=-1)
        assert full.any(), name
        if bias is not None:
            assert (bias == -torch.inf).any(), name


def test_variants_have_names_of_their_own() -> None:
    variants = servable(HOPPER)
    assert len({str(variant) for variant in variants}) == len(set(variants)) == len(variants) > 1000
    assert {variant.kind.mask for variant in variants} == {kind.name.lower() for kind in MaskKind}
    assert all(BACKENDS[variant.backend].proof != "none" for variant in variants)


# ---------------------------------------------------------------------------------------------------------------------
# In processes of their own
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_outlives_what_it_checks(
    plant: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right, wrong, killed and hung: each is told, and what died is refused until it is asked for again."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    plant("none")
    variants = [VARIANT._replace(kind=VARIANT.kind._replace(head_dim=dim)) for dim in (8, 16, 24, 32)]
    monkeypatch.setattr(command, "_gpus", lambda: [CPU])
    monkeypatch.setattr(command, "servable", lambda part: variants)
    monkeypatch.setattr(command, "CHECK", "parts:answer")
    assert command.main(["check", "--limit", "3"]) == 1
    right, wrong, killed, hung, summary = capsys.readouterr().out.splitlines()
    assert right.startswith(f"right  cpu {variants[0]}: self-checked: ")
    assert "out: largest error" in wrong
    assert killed == f"WRONG  cpu {variants[2]}: its process ended with status -9"
    assert hung == f"WRONG  cpu {variants[3]}: no answer within 3 seconds"
    assert summary == "1 right, 3 not"
    told = command._describe_store(store())
    assert told[0] == "  1 variant right, 3 not"
    monkeypatch.setattr(command, "servable", lambda part: [])
    assert set(command._variants(PART, store())) == set(variants[1:])  # of any kind: what was refused is tried again
    for variant in variants[2:]:
        assert "died or was ended in its check" in check.checked(tuple(variant), CPU).reason
    finding = check.check(variants[2], CPU, anew=True)  # whoever asks for it, where it does not die
    assert finding.right
    forget()
    assert check.checked(tuple(variants[2]), CPU).right


def test_a_part_without_gpus_has_nothing_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["check"]) == 0
    assert "nothing to check" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The kernels, in Triton's interpreter
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The part is the interpreter, and what serves there as `triton` are the kernels; plants a fault in their run."""
    from flash_attend.kernels import statistics
    from flash_attend.kernels.configs import INTERPRETED, override
    from flash_attend.kernels.softmax import Softmax

    places = dict(forward=(Softmax, "finish"), backward=(statistics, "recomputed_weights"))

    def plant(fault: Callable[..., object], where: str = "forward") -> None:
        right = getattr(*places[where])

        def spoiled(*given: object, **named: object) -> object:
            found = right(*given, **named)
            return fault(*found) if isinstance(found, tuple) else fault(found)[0]

        monkeypatch.setattr(*places[where], spoiled)

    monkeypatch.setattr(DeviceTarget, "of", staticmethod(constant_when_compiled(lambda device: PART)))
    leave_out_torchs(monkeypatch.setitem)
    with override(INTERPRETED):
        yield plant


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels")
def test_auto_takes_kernels_that_were_right() -> None:
    """bfloat16, which the interpreter computes wrongly, is found out."""
    q, k, v = inputs()
    out = flash_attention(q, k, v, causal=True)
    assert explain(q, k, v, causal=True).plan.name == "triton"
    assert torch.allclose(out, flash_attention(q, k, v, causal=True, backend="math"), atol=1e-6)
    half = [tensor.detach().bfloat16() for tensor in (q, k, v)]
    with pytest.warns(UserWarning, match="triton: its self-check failed here: AssertionError: "):
        flash_attention(*half)
    assert explain(*half).plan.name == "math"


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("fault", "where", "told"),
    (
        ("wrong", "forward", r"out: largest error .* allowed"),
        ("wrong", "backward", r"dq: largest error .* allowed"),
        ("nan", "forward", "out .*"),
        ("raises", "forward", ".*RuntimeError.*out of resource: shared memory"),
    ),
)
def test_auto_takes_no_kernels_that_were_not(
    kernels: Callable, checks: list[str], fault: str, where: str, told: str
) -> None:
    kernels(FAULTS[fault], where)
    for _ in range(2):  # the second as another process: told again, and not checked again
        with pytest.warns(UserWarning, match=rf"triton: its self-check failed here: .*{told}.*please report") as caught:
            for length in (2, 3, 5):
                flash_attention(*(tensor[:, :, :length] for tensor in inputs()))
        assert len(caught) == 1
        assert str(VARIANT) in str(caught[0].message)
        assert served() == "math"
        assert "triton     by name  its self-check failed here" in str(explain(*inputs()))
        forget()
    assert checks == [str(VARIANT)]


@pytest.mark.interpreter
@pytest.mark.parametrize("fault", ("killed", "hung"))
def test_auto_takes_no_kernels_that_a_process_died_in(
    kernels: Callable, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """While they hang they are waited for, and then refused for this process; for others once that one is ended."""
    fork = multiprocessing.get_context("fork")
    within = fork.Event()
    kernels(lambda *found: within.set() or FAULTS[fault](*found))
    with torch.no_grad():
        process = fork.Process(target=flash_attention, args=inputs())
        process.start()
        assert within.wait(60)
        if fault == "hung":
            monkeypatch.setattr(marks, "LONGEST_WAIT", 0.1)
            with pytest.warns(UserWarning, match="another process has been checking it"):
                flash_attention(*inputs())
            assert served() == "math"
            process.kill()
            forget()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        with pytest.warns(UserWarning, match="died or was ended in its check; `python -m flash_attend check` tries it"):
            flash_attention(*inputs())
        assert served() == "math"
