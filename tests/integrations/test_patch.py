"""`patch`: the object stays and its class changes; options are read at every call; everything comes back."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clients import (
    COMPLEX,
    NATURALSPEECH2,
    PADDING,
    STRANGER,
    Holder,
    assert_same,
    fake,
    fake_known,
    inputs,
    plain_attention,
    refusal,
    refused,
)
from complex_valued_transformer import ComplexTransformer
from complex_valued_transformer.attend import Attend as ClientAttend
from torch import Tensor, nn

import flash_attend
from flash_attend import Attend, patch
from flash_attend.integrations import (
    BroadcastMaskAttend,
    PatchError,
    ServedAttend,
    TiledHeadsAttend,
    served,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*")  # what the client's flash path calls


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """What the served ones have asked `flash_attention` for."""
    calls: list[dict[str, Any]] = []
    attention = served.flash_attention

    def watched(*qkv, **options):
        calls.append(options)
        return attention(*qkv, **options | {"backend": "math"})

    monkeypatch.setattr(served, "flash_attention", watched)
    return calls


def ask(attend: nn.Module, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """What one call asks for."""
    asked.clear()
    attend(*inputs())
    (call,) = asked
    return call


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


def test_the_object_and_all_that_it_holds_stay():
    attend = ClientAttend(causal=True, dropout=0.1)
    model = Holder(attend)
    before, state = dict(vars(attend)), model.state_dict().keys()
    handle = patch(model, strict=True)
    assert model.attend is attend
    assert isinstance(attend, ClientAttend)
    assert isinstance(attend, ServedAttend)
    assert dict(vars(attend)) == before
    assert model.state_dict().keys() == state
    assert repr(attend).startswith("ServedAttend(\n  backend='auto'\n  (attn_dropout): Dropout(p=0.1")
    handle.restore()
    assert type(attend) is ClientAttend
    assert dict(vars(attend)) == before


def test_a_model_may_be_an_attend_itself():
    attend = ClientAttend(causal=True)
    expected = attend(*inputs())
    assert patch(attend, strict=True).outcomes[0].paths == ("(the model itself)",)
    assert_same(attend(*inputs()), expected)


def test_hooks_stay():
    attend, called = fake_known(), []
    attend.register_forward_pre_hook(lambda *_: called.append("before"))
    attend.register_forward_hook(lambda *_: called.append("after"))
    attend.register_full_backward_hook(lambda *_: called.append("back"))
    attend.register_state_dict_pre_hook(lambda *_: called.append("state"))
    handle = patch(attend, strict=True)
    for _ in range(2):
        attend(*(x.requires_grad_() for x in inputs())).sum().backward()
        attend.state_dict()
        assert called == ["before", "after", "back", "state"]
        called.clear()
        handle.restore()


def test_its_other_methods_and_what_the_class_holds_stay():
    attend = fake_known()
    type(attend).note = "kept"
    type(attend).get_mask = lambda self, n: torch.ones(n)
    model = Holder(attend)
    model.get_mask = attend.get_mask
    patch(model, strict=True)
    assert attend.note == "kept"
    assert torch.equal(model.get_mask(3), attend.get_mask(3))


def test_options_are_read_at_every_call(asked):
    attend = fake_known(COMPLEX, causal=True, scale=0.5, dropout=0.25)
    handle = patch(attend, strict=True)
    call = ask(attend, asked)
    assert (call["causal"], call["scale"], call["dropout_p"]) == (True, 0.5, 0.25)
    attend.causal, attend.scale, attend.attn_dropout.p = False, None, 0.75
    call = ask(attend, asked)
    assert (call["causal"], call["scale"], call["dropout_p"]) == (False, None, 0.75)
    assert (handle.outcomes[0].causal, handle.outcomes[0].scale, handle.outcomes[0].dropout) == (False, None, 0.75)
    handle.restore()
    assert (attend.causal, attend.scale, attend.attn_dropout.p) == (False, None, 0.75)


def test_the_dropout_in_force_is_that_of_the_path_that_the_flag_chooses(asked):
    attend = fake_known(dropout=0.1)
    attend.attn_dropout.p = 0.5  # the einsum path reads this one, the flash path the other
    outcome = patch(attend, strict=True).outcomes[0]
    assert ask(attend, asked)["dropout_p"] == outcome.dropout == 0.5
    attend.use_flash = True
    assert ask(attend, asked)["dropout_p"] == outcome.dropout == 0.1
    attend.attn_dropout.eval()
    assert ask(attend, asked)["dropout_p"] == 0.1  # the flash path goes by the module's own state
    attend.use_flash = False
    assert ask(attend, asked)["dropout_p"] == 0.0
    attend.eval()
    attend.attn_dropout.train()
    assert ask(attend, asked)["dropout_p"] == 0.5
    attend.attn_dropout = nn.Identity()
    assert ask(attend, asked)["dropout_p"] == 0.0
    attend.attn_dropout = nn.AlphaDropout(0.5)
    with pytest.raises(TypeError, match=r"attn_dropout must be an nn\.Dropout, got AlphaDropout"):
        attend(*inputs())


def test_train_and_eval_reach_it_where_they_did(asked):
    model = nn.Module()
    model.inside, model.outside = fake_known(dropout=0.5), [fake_known(dropout=0.5)]
    handle = patch(model, strict=True)
    model.eval()
    assert ask(model.inside, asked)["dropout_p"] == 0.0
    assert ask(model.outside[0], asked)["dropout_p"] == 0.5
    handle.restore()
    assert (model.inside.training, model.inside.attn_dropout.training, model.outside[0].training) == (
        False,
        False,
        True,
    )


@pytest.mark.parametrize("flash", [False, True])
def test_the_flag_is_heeded_on_request(flash, asked):
    attend = fake_known(use_flash=flash)
    with patch(attend, backend="auto", deterministic=True):
        call = ask(attend, asked)
        assert (call["backend"], call["deterministic"]) == ("auto", True)
    with patch(attend, keep_flash=True):
        assert ask(attend, asked)["backend"] == ("auto" if flash else "math")
        attend.use_flash = not flash
        assert ask(attend, asked)["backend"] == ("math" if flash else "auto")
        attend.use_flash = flash
    if flash:
        with patch(attend, keep_flash=True, backend="triton"):
            assert ask(attend, asked)["backend"] == "triton"
    else:
        assert "flash=False asks for the einsum path" in refusal(attend, keep_flash=True, backend="triton")


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


def save_and_load(value: Any) -> Any:
    """By torch, as whole modules travel."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": save_and_load,
    **{f"pickle {n}": functools.partial(lambda n, x: pickle.loads(pickle.dumps(x, n)), n) for n in (0, 2, 5)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reading", [ServedAttend, BroadcastMaskAttend, TiledHeadsAttend])
def test_a_copy_is_served_as_well(way, reading):
    attend = ClientAttend(causal=True)
    service = served.Service(backend="math", deterministic=True)
    attend.__class__ = served.served_class(served.Serving(ClientAttend, reading, "flash", (service,)))
    again = WAYS[way](attend)
    assert repr(again) == repr(attend)
    assert isinstance(again, ClientAttend)
    assert isinstance(again, reading)
    assert vars(again).keys() == vars(attend).keys()
    again.causal = False
    assert attend.causal
    attend.causal = False
    assert torch.equal(again(*inputs()), attend(*inputs()))


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "pickle 5"])
def test_a_handle_goes_with_its_model(way):
    model = Holder(ClientAttend())
    first, second = patch(model, backend="math"), patch(model)
    again, its_first, its_second = WAYS[way]((model, first, second))
    assert str(its_first) == str(first)
    its_first.restore()
    assert type(again.attend)._flash_attend.services == (its_second._service,)
    its_second.restore()
    assert type(again.attend) is ClientAttend
    assert len(type(model.attend)._flash_attend.services) == 2


def test_a_pickle_is_served_in_a_process_started_afresh():
    torch.manual_seed(0)
    model = ComplexTransformer(dim=16, depth=2, num_tokens=32, causal=True, heads=2, dim_head=8).eval()
    patch(model, backend="math", strict=True)
    tokens = torch.arange(9)[None]
    script = (
        "import pickle, sys, torch; torch.set_num_threads(int(sys.argv[1]));"
        "model, tokens = pickle.load(sys.stdin.buffer);"
        "shown = {type(layer[1].attend.keywords['attend']).__name__ for layer in model.layers};"
        "sys.stdout.buffer.write(pickle.dumps((shown, model(tokens).detach())))"
    )
    # With another number of threads, sums would run in another order.
    command = [sys.executable, "-c", script, str(torch.get_num_threads())]
    run = subprocess.run(command, input=pickle.dumps((model, tokens)), capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr.decode()
    shown, answer = pickle.loads(run.stdout)
    assert shown == {"ServedAttend"}
    assert torch.equal(answer, model(tokens))


# ---------------------------------------------------------------------------------------------------------------------
# Compilers
# ---------------------------------------------------------------------------------------------------------------------


def compiled_whole(attend: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = Holder(attend)
    return model, torch.compile(model, backend="eager", fullgraph=True)


def compiled_alone(attend: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = Holder(torch.compile(attend, backend="eager", fullgraph=True))
    return model, model


def compiled_in_place(attend: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    attend.compile(backend="eager", fullgraph=True)
    return Holder(attend), attend


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_alone, compiled_in_place], ids=lambda way: way.__name__)
def test_what_is_compiled_already_is_compiled_anew(compiled):
    torch.compiler.reset()
    attend = ClientAttend(causal=True)
    model, call = compiled(attend)
    blind = (
        PADDING[:, None, None] & torch.tensor([True, False])[:, None, None, None]
    )  # ours gives 0 where all is hidden
    expected = call(*inputs())
    assert call(*inputs(), mask=blind)[1].any()
    handle = patch(model, strict=True)
    assert_same(call(*inputs()), expected)
    assert not call(*inputs(), mask=blind)[1].any()
    attend.causal = False
    assert_same(call(*inputs()), plain_attention(attend.eval(), *inputs()))
    attend.causal = True
    handle.restore()
    assert torch.equal(call(*inputs()), expected)
    assert call(*inputs(), mask=blind)[1].any()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def changed(path: str = COMPLEX, **attributes: Any) -> nn.Module:
    attend = fake_known(path)
    for name, value in attributes.items():
        setattr(attend, name, value)
    return attend


def subclass() -> nn.Module:
    kind = type(fake_known())
    return type("Attend", (kind,), {"__module__": "my_package", "forward": lambda self, q, k, v, mask=None: v})()


def foreign_forward() -> nn.Module:
    attend = fake_known()
    type(attend).forward = lambda self, q, k, v, mask=None: v
    return attend


def hooked_dropout() -> nn.Module:
    attend = fake_known()
    attend.attn_dropout.register_forward_hook(print)
    return attend


def raising(name: str) -> nn.Module:
    attend = fake_known(COMPLEX)
    vars(attend).pop(name)

    def raises(self):
        raise RuntimeError("not yet known")

    setattr(type(attend), name, property(raises))
    return attend


def with_options(*names: str, path: str = NATURALSPEECH2, arguments: Any = ("mask",)) -> nn.Module:
    options = {"dropout": 0.0, "causal": False, **dict.fromkeys(names, False)}
    return fake(path=path, options=options, arguments=arguments)(**dict.fromkeys(names, True))


REFUSED = {
    "dropout of 1": (lambda: changed(dropout=1.0, flash=True), r"dropout must be in [0, 1), got 1.0"),
    "learned scale": (lambda: changed(scale=torch.ones(())), "scale must be a Python number, got Tensor"),
    "infinite scale": (lambda: changed(scale=float("inf")), "scale must be finite, got float inf"),
    "endless scale": (lambda: changed(scale=10**400), ""),
    "causal that is no bool": (lambda: changed(causal=None), "causal must be a bool, got NoneType"),
    "scale that raises": (lambda: raising("scale"), "it cannot be examined: RuntimeError: not yet known"),
    "causal that raises": (lambda: raising("causal"), "it cannot be examined: RuntimeError: not yet known"),
    "flag that raises": (lambda: raising("flash"), "it cannot be examined: RuntimeError: not yet known"),
    "an attribute": (lambda: changed(window=128), "it holds window, of which flash_attend does not know the meaning"),
    "a parameter": (lambda: changed(temperature=nn.Parameter(torch.ones(1))), "it holds temperature"),
    "a buffer": (lambda: changed(table=nn.Buffer(torch.ones(1), persistent=False)), "it holds table"),
    "a submodule": (lambda: changed(norm=nn.LayerNorm(8)), "it holds norm"),
    "another dropout": (lambda: changed(attn_dropout=nn.AlphaDropout()), "its attn_dropout is a AlphaDropout"),
    "hook of the dropout": (hooked_dropout, "its attn_dropout has _forward_hooks, and is not called by ours"),
    "replaced forward": (lambda: changed(forward=lambda q, k, v, mask=None: v), "its forward was replaced on this"),
    "replaced forward of the class": (foreign_forward, "its forward was replaced by one from"),
    "subclass of a known class": (subclass, f"it is a subclass of {NATURALSPEECH2}"),
    "option of a newer version": (
        lambda: with_options("use_flash", "qk_norm"),
        "option qk_norm=True is not supported; these are: causal, dropout, use_flash",
    ),
    "argument of a newer version": (
        lambda: with_options("use_flash", arguments={"mask": None, "window": 128}),
        "its forward takes (q, k, v, mask, window); supported is (q, k, v, mask), and others at None or False",
    ),
    "argument that is missing": (
        lambda: with_options("use_flash", arguments=()),
        "its forward takes (q, k, v); supported is (q, k, v, mask), and others at None or False",
    ),
    "unknown option": (lambda: with_options("alibi", path=STRANGER), "option alibi=True is not supported"),
    "unknown argument": (
        lambda: with_options(path=STRANGER, arguments={"mask": None, "rel_pos": 1.0}),
        "not in the table of known classes, and its forward takes (q, k, v, mask, rel_pos)",
    ),
    "unknown form": (
        lambda: type("Attend", (nn.Module,), {"forward": lambda self, x: x, "__module__": __name__})(),
        "its forward takes (x)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_with_a_reason(case):
    make, told = REFUSED[case]
    handle = refused(Holder(make()))
    reason = handle.outcomes[0].reason
    assert told in reason
    assert ("examined" in reason) == ("examined" in told)
    assert all(len(line) < 400 for line in str(handle).splitlines())


@pytest.mark.parametrize("path", [NATURALSPEECH2, STRANGER])
def test_what_asks_for_nothing_is_accepted_until_it_does(path):
    """An option and an argument of a newer version, both off."""
    options = {"dropout": 0.0, "causal": False, "use_flash": False, "window": None, "inverted": False}
    attend = fake(path=path, options=options, arguments={"mask": None, "rel_pos": None, "hard": False})()
    expected = attend(*inputs(), mask=PADDING)
    patch(attend, strict=True)
    assert_same(attend(*inputs(), PADDING, None, hard=False), expected)
    for wrong in ({"rel_pos": torch.zeros(6, 6)}, {"hard": True}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be None or False"):
            attend(*inputs(), **wrong)
    for wrong in ((PADDING, None, False, None), (PADDING, PADDING)):
        with pytest.raises((TypeError, ValueError)):
            attend(*inputs(), *wrong)
    with pytest.raises(TypeError, match=r"it takes \(q, k, v, mask, rel_pos, hard\)"):
        attend(*inputs(), causal=True)
    attend.window = 128
    with pytest.raises(ValueError, match="window must be None or False"):
        attend(*inputs())


def test_a_bound_forward_that_is_held_is_refused():
    """It goes on to run the function that it was made of."""
    model = Holder(ClientAttend())
    model.held = {"call": model.attend.forward}
    assert "held['call'] holds its bound method forward" in refused(model).outcomes[0].reason
    model = nn.Module()
    model.held = torch.compile(ClientAttend().forward, backend="eager")
    assert "holds its bound method forward" in refused(model).outcomes[0].reason


def test_the_others_are_served_beside_a_refused_one():
    model = nn.ModuleList([fake_known(), foreign_forward()])
    with pytest.warns(UserWarning, match="patch left as it is: 1 "):
        handle = patch(model)
    assert (handle.replaced, handle.refused) == (1, 1)
    assert [isinstance(attend, ServedAttend) for attend in model] == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# The handle
# ---------------------------------------------------------------------------------------------------------------------


def test_the_report_shows_each_attend():
    good = fake_known(COMPLEX, causal=True, scale=0.5, dropout=0.25)
    model = nn.ModuleDict({"good": good, "bad": foreign_forward(), "odd": raising("scale")})
    with pytest.warns(UserWarning) as told:
        handle = patch(model)
    assert [str(warning.message)[:24] for warning in told] == ["patch left as it is: bad", "patch left as it is: odd"]
    good.attn_dropout.p = 0.75
    head, *rows, summary = [line.split() for line in str(handle).splitlines()]
    assert head == ["path", "class", "causal", "dropout", "scale", "status", "reason", "or", "note"]
    assert rows[0] == ["good", COMPLEX, "True", "0.75", "0.5", "replaced"]
    assert rows[1][:9] == ["bad", NATURALSPEECH2, "False", "0.0", "None", "refused", "its", "forward", "was"]
    assert rows[2][:6] == ["odd", COMPLEX, "False", "0.0", "(RuntimeError)", "refused"]
    assert summary == ["1", "replaced,", "2", "refused"]


def test_a_with_block_restores():
    attend = fake_known()
    kind = type(attend)
    with pytest.raises(RuntimeError, match="inside"), patch(attend) as handle:
        assert isinstance(attend, ServedAttend)
        assert handle.replaced == 1
        raise RuntimeError("inside")
    assert type(attend) is kind


def test_patching_again_with_the_same_options_changes_nothing():
    attend = fake_known()
    first = patch(attend)
    kind = type(attend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = patch(attend, strict=True)
    assert type(attend) is kind
    assert (again.replaced, again.refused, again.outcomes[0].status) == (0, 0, "ours already")
    again.restore()
    assert type(attend) is kind
    first.restore()
    first.restore()
    assert not isinstance(attend, ServedAttend)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_the_last_call_that_was_not_undone_counts(order, asked):
    attend = fake_known()
    kind, backends = type(attend), ["math", "auto", "math"]
    handles = [patch(attend, backend=backend, strict=True) for backend in backends]
    assert [handle.replaced for handle in handles] == [1, 1, 1]
    assert handles[2].outcomes[0].kind == NATURALSPEECH2
    left = [0, 1, 2]
    for undone in order:
        assert ask(attend, asked)["backend"] == backends[left[-1]]
        assert isinstance(attend, kind)
        handles[undone].restore()
        handles[undone].restore()
        left.remove(undone)
    assert type(attend) is kind


def test_patching_again_judges_again():
    attend = fake_known()
    with patch(attend, backend="math"):
        attend.window = 128
        with pytest.warns(UserWarning, match="it holds window"):
            assert patch(attend).refused == 1
        assert type(attend)._flash_attend.services[-1].backend == "math"


def test_a_class_that_somebody_else_changed_since_is_left_alone():
    attend = fake_known()
    handle = patch(attend)
    derived = type("Wrapped", (type(attend),), {})
    attend.__class__ = derived
    handle.restore()
    assert type(attend) is derived
    assert patch(attend).outcomes[0].status == "ours already"
    with pytest.warns(UserWarning, match="its class became .*Wrapped after it was patched"):
        patch(attend, backend="math")


def test_a_served_one_is_known_when_the_package_is_loaded_again():
    """As after a reload in a notebook: the modules are others, the objects are not."""
    model = nn.ModuleList([ClientAttend(causal=True), Attend(causal=True)])
    handle = patch(model, backend="math", strict=True)
    names = ("served", "known", "lucidrains", "x_transformers", "search", "comparison", "judging", "patching")
    modules = [importlib.import_module(f"flash_attend.integrations.{name}") for name in names]
    package = importlib.import_module("flash_attend.attend")
    contents = {module: dict(vars(module)) for module in (package, *modules)}
    try:
        for module in contents:
            importlib.reload(module)
        renewed = modules[-1]
        assert renewed.Attend is not Attend
        assert [outcome.status for outcome in renewed.patch(model, backend="math").outcomes] == ["ours already"] * 2
        with renewed.patch(model) as again:
            assert [outcome.status for outcome in again.outcomes] == ["replaced", "ours already"]
            assert_same(model[0](*inputs()), model[1](*inputs()))
        assert type(model[0])._flash_attend.services[-1].backend == "math"
    finally:
        for module, held in contents.items():
            vars(module).update(held)
    handle.restore()
    assert type(model[0]) is ClientAttend


# ---------------------------------------------------------------------------------------------------------------------
# Nothing found, strictness, bad arguments, names
# ---------------------------------------------------------------------------------------------------------------------


def test_finding_nothing_warns():
    with pytest.warns(UserWarning, match="patch found no Attend in Linear"):
        handle = patch(nn.Linear(2, 2))
    assert (handle.replaced, handle.refused) == (0, 0)
    with pytest.raises(PatchError, match="no Attend found in Linear"):
        patch(nn.Linear(2, 2), strict=True)


def test_what_may_be_attention_of_another_form_is_listed():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False)
    path = "torch.nn.modules.activation.MultiheadAttention"
    told = f"found no Attend in TransformerEncoder, only layers.0.self_attn (+2 more) ({path}), which patch_sdpa"
    with pytest.warns(UserWarning, match=re.escape(told)):
        patch(layers)


def test_strict_raises_before_anything_is_changed():
    model = nn.ModuleDict({"good": fake_known(), "bad": foreign_forward()})
    with pytest.raises(PatchError, match=r"bad \(naturalspeech2_pytorch.attend.Attend\): its forward was replaced"):
        patch(model, strict=True)
    assert not isinstance(model["good"], ServedAttend)


@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)], nn.Linear])
def test_a_model_must_be_a_module(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        patch(model)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
        ({"keep_flash": 1}, TypeError, "keep_flash must be True or False, got 1"),
        ({"strict": "yes"}, TypeError, "strict must be True or False, got 'yes'"),
        ({"deterministic": 0}, TypeError, "deterministic must be a bool, got int 0"),
    ],
)
def test_bad_arguments_are_named(options, error, told):
    model = Holder(fake_known())
    with pytest.raises(error, match=told):
        patch(model, **options)
    assert not isinstance(model.attend, ServedAttend)


def test_one_name_is_one_thing():
    """The function is at both places; nothing that is imported can take its name from it."""
    assert flash_attend.patch is flash_attend.integrations.patch is patch
    for name in ("flash_attend.patch", "flash_attend.integrations.patch"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
