"""`patch`: finds every Attend, keeps what it means, and undoes itself."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings
from collections import deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import complex_valued_transformer.complex_valued_transformer as client
import pytest
import torch
from complex_valued_transformer.attend import Attend as ClientAttend
from torch import Tensor, nn

from flash_attend import Attend, patch
from flash_attend.patch import (
    KNOWN,
    BroadcastMaskAttend,
    KnownAttend,
    NoBiasAttend,
    PatchError,
    TiledHeadsAttend,
    register,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*")  # what the client's flash path calls

X_TRANSFORMERS = "x_transformers.attend.Attend"
NATURALSPEECH2 = "naturalspeech2_pytorch.attend.Attend"
COMPLEX = "complex_valued_transformer.attend.Attend"


# ---------------------------------------------------------------------------------------------------------------------
# Other people's classes, as far as their interface goes
# ---------------------------------------------------------------------------------------------------------------------


def plain_attention(attend: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention with whole score matrices, in the dtype of the inputs; a 2-D mask is key padding."""
    k, v = (x[:, None] if x.ndim == 3 else x for x in (k, v))
    scale = getattr(attend, "scale", None)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask
        scores = scores.masked_fill(~mask, -torch.inf)
    if getattr(attend, "causal", False):
        queries, keys = scores.shape[-2:]
        future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(dim=-1) @ v


def fake(
    path: str = "some_package.attend.Attend",
    options: dict[str, Any] | None = None,
    arguments: tuple[str, ...] = ("mask",),
    compute: Callable[..., Any] = plain_attention,
) -> type[nn.Module]:
    """A class with the path, the constructor parameters and the arguments of forward that are given."""
    options = {"dropout": 0.0, "causal": False, "flash": False} if options is None else options
    module, _, name = path.rpartition(".")

    def __init__(self, **given):
        nn.Module.__init__(self)
        for option in options:
            setattr(self, option, given.get(option, options[option]))
        if "dropout" in options:
            self.attn_dropout = nn.Dropout(self.dropout)
        self.calls = 0

    def forward(self, q, k, v, **others):
        self.calls += 1
        return compute(self, q, k, v, **others)

    keyword = inspect.Parameter.KEYWORD_ONLY
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = inspect.Signature(
        [itself, *(inspect.Parameter(option, keyword, default=value) for option, value in options.items())]
    )
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(
        [
            inspect.Parameter("self", either),
            *(inspect.Parameter(argument, either) for argument in "qkv"),
            *(inspect.Parameter(argument, either, default=None) for argument in arguments),
        ]
    )
    forward.__module__ = module
    return type(name, (nn.Module,), {"__init__": __init__, "forward": forward, "__module__": module})


def fake_known(path: str, **options: Any) -> nn.Module:
    """An instance of a fake of a known class, with the interface that its row describes."""
    row = KNOWN[path]
    defaults = {"dropout": 0.0, "causal": False, "heads": None, "scale": None, row.flash: False}
    return fake(path, {name: defaults[name] for name in row.options}, row.arguments)(**options)


class Holder(nn.Module):
    """Calls what it holds as `attend`."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *inputs, **masks):
        """Attends."""
        return self.attend(*inputs, **masks)


def inputs(heads: int = 4, kv_heads: int | None = 4, queries: int = 6, keys: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    kv = (2, keys, 8) if kv_heads is None else (2, kv_heads, keys, 8)
    return tuple(torch.randn(size, generator=generator) for size in ((2, heads, queries, 8), kv, kv))


PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)


def assert_same(answer: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)


def refusal(model: nn.Module, **options: Any) -> str:
    """The reason why the one Attend of a model is refused, which must change nothing."""
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.warns(UserWarning, match="patch left .* as it is"):
        handle = patch(model, **options)
    assert (handle.replaced, handle.refused) == (0, 1)
    assert {name: id(module) for name, module in model.named_modules()} == before
    return handle.outcomes[0].reason


# ---------------------------------------------------------------------------------------------------------------------
# The real client
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_client(monkeypatch) -> Callable[..., nn.Module]:
    """Makes a small complex-valued transformer in double precision, where a difference in meaning cannot hide."""
    monkeypatch.setattr(client, "cfloat", torch.complex128)  # what the client builds with, and asserts

    def make(flash: bool, complete: bool = False) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"num_tokens": 32, "dim": 16, "depth": 2, "heads": 2, "dim_head": 4}
        model = client.ComplexTransformer(**sizes, causal=True, flash_attn=flash, complete_complex=complete)
        for norm in (module for module in model.modules() if isinstance(module, client.ComplexRMSNorm)):
            nn.init.constant_(norm.gamma, 16)  # gives the attention weight in what comes out
        return model.double()

    return make


def answers(model: nn.Module, mask: Tensor | None) -> list[Tensor]:
    """The logits and the gradient of every parameter."""
    tokens = torch.arange(24).reshape(2, 12) * 7 % 32
    logits = model(tokens, mask=mask)
    model.zero_grad()
    (logits.real.square().mean() + logits.imag.mean()).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "right padding"])
@pytest.mark.parametrize("complete", [False, True], ids=["real form", "complete form"])
@pytest.mark.parametrize("flash", [False, True], ids=["einsum", "flash"])
def test_the_real_client_computes_the_same(real_client, flash, complete, padded, mode):
    model = real_client(flash, complete).train(mode == "train")
    mask = (torch.arange(12) < torch.tensor([[12], [5]]))[:, None, None, :] if padded else None
    before = answers(model, mask)
    handle = patch(model, strict=True)
    after = answers(model, mask)
    assert (handle.replaced, handle.refused) == (2, 0)
    for x, y in zip(after, before, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    handle.restore()
    for x, y in zip(answers(model, mask), before, strict=True):
        assert torch.equal(x, y)


def test_the_real_client_notices_a_different_attend(real_client):
    model = real_client(False)
    before = answers(model, None)
    patch(model)
    for layer in model.layers:
        layer[1].attend.keywords["attend"].causal = False
    largest = max((x - y).abs().max().item() for x, y in zip(answers(model, None), before, strict=True))
    assert largest > 1e-3


def test_the_real_client_keeps_its_attend_in_a_partial(real_client):
    model = real_client(True)
    originals = [layer[1].attend.keywords["attend"] for layer in model.layers]
    partials = [layer[1].attend for layer in model.layers]
    handle = patch(model)
    assert [outcome.paths for outcome in handle.outcomes] == [
        ("layers.0.1.attend.keywords['attend']",),
        ("layers.1.1.attend.keywords['attend']",),
    ]
    assert all(isinstance(layer[1].attend.keywords["attend"], Attend) for layer in model.layers)
    assert [layer[1].attend for layer in model.layers] == partials
    handle.restore()
    assert [layer[1].attend.keywords["attend"] for layer in model.layers] == originals


def test_the_real_client_can_be_saved_and_copied_after_patching(real_client):
    model = real_client(True)
    checkpoint = model.state_dict()
    patch(model)
    assert model.state_dict().keys() == checkpoint.keys()
    model.load_state_dict(checkpoint, strict=True)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for x, y in zip(answers(again, None), answers(model, None), strict=True):
        assert torch.equal(x, y)


def test_the_real_class_reads_a_2d_mask_as_pairs():
    attend = ClientAttend()
    model = Holder(attend)
    pairs = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = model(*inputs(), mask=pairs)
    patch(model)
    assert isinstance(model.attend, BroadcastMaskAttend)
    assert_same(model(*inputs(), mask=pairs), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Where a model keeps its Attend
# ---------------------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["attend", "other"])


@dataclass
class Record:
    """Holds an Attend."""

    attend: Any


@dataclass(frozen=True)
class FrozenRecord:
    """Holds an Attend for good."""

    attend: Any


class Helper:
    """Not a module, but called like one."""

    def __init__(self, attend: nn.Module) -> None:
        self.inner = {"attend": attend}

    def __call__(self, *inputs):
        return self.inner["attend"](*inputs)


def call_with(q, k, v, *, attend):
    return attend(q, k, v)


def call_first(attend, q, k, v):
    return attend(q, k, v)


def closure(attend):
    def inner(q, k, v):
        return attend(q, k, v)

    return inner


def default(attend):
    def inner(q, k, v, attend=attend):
        return attend(q, k, v)

    return inner


def keyword_default(attend):
    def inner(q, k, v, *, attend=attend):
        return attend(q, k, v)

    return inner


def function_attribute(attend):
    def inner(q, k, v):
        return inner.attend(q, k, v)

    inner.attend = attend
    return inner


def cyclic(attend):
    itself = {"attend": attend}
    itself["again"] = [itself]
    return itself


# What the model holds, and how it gets from there to a call.
PLACES = {
    "submodule": (lambda attend: attend, lambda held: held),
    "ModuleList": (lambda attend: nn.ModuleList([nn.Identity(), attend]), lambda held: held[1]),
    "ModuleDict": (lambda attend: nn.ModuleDict({"a": attend}), lambda held: held["a"]),
    "nested modules": (lambda attend: nn.ModuleList([Holder(Holder(attend))]), lambda held: held[0]),
    "list": (lambda attend: [None, attend], lambda held: held[1]),
    "dict": (lambda attend: {"a": [attend]}, lambda held: held["a"][0]),
    "deque": (lambda attend: deque([attend]), lambda held: held[0]),
    "tuple": (lambda attend: (1, attend, "x"), lambda held: held[1]),
    "nested tuples": (lambda attend: ((attend, 0), [(0, (attend,))]), lambda held: held[1][0][1][0]),
    "named tuple": (lambda attend: Pair(attend, 1), lambda held: held.attend),
    "partial, keyword": (lambda attend: functools.partial(call_with, attend=attend), lambda held: held),
    "partial, argument": (lambda attend: functools.partial(call_first, attend), lambda held: held),
    "partial, function": (lambda attend: functools.partial(attend, mask=None), lambda held: held),
    "nested partials": (
        lambda attend: functools.partial(call_first, functools.partial(call_with, attend=attend)),
        lambda held: held,
    ),
    "closure": (closure, lambda held: held),
    "lambda in a partial": (
        lambda attend: functools.partial(call_first, lambda q, k, v: attend(q, k, v)),
        lambda held: held,
    ),
    "default": (default, lambda held: held),
    "keyword default": (keyword_default, lambda held: held),
    "function attribute": (function_attribute, lambda held: held),
    "bound forward": (lambda attend: attend.forward, lambda held: held),
    "bound call": (lambda attend: (attend.__call__,), lambda held: held[0]),
    "method of another module": (lambda attend: Holder(attend).forward, lambda held: held),
    "record": (Record, lambda held: held.attend),
    "frozen record": (FrozenRecord, lambda held: held.attend),
    "namespace": (lambda attend: SimpleNamespace(a=attend), lambda held: held.a),
    "callable helper": (Helper, lambda held: held),
    "cycle": (cyclic, lambda held: held["again"][0]["attend"]),
}


@pytest.mark.parametrize("place", PLACES)
def test_is_found_wherever_it_is_held(place):
    put, take = PLACES[place]
    original = fake_known(NATURALSPEECH2, causal=True)
    model = nn.Module()
    model.held = put(original)
    expected = take(model.held)(*inputs())
    assert original.calls == 1

    handle = patch(model, strict=True)
    assert (handle.replaced, handle.refused) == (1, 0)
    assert_same(take(model.held)(*inputs()), expected)
    assert original.calls == 1

    handle.restore()
    assert torch.equal(take(model.held)(*inputs()), expected)
    assert original.calls == 2


def test_is_found_as_a_plain_attribute():
    model, original = nn.Module(), fake_known(NATURALSPEECH2)
    vars(model)["hidden"] = original
    handle = patch(model)
    assert isinstance(model.hidden, Attend)
    assert "hidden" not in dict(model.named_modules())
    handle.restore()
    assert vars(model)["hidden"] is original


def test_one_attend_in_many_places_gets_one_replacement():
    original = fake_known(NATURALSPEECH2)
    model = nn.ModuleList([Holder(original), Holder(original)])
    model.spare = functools.partial(call_with, attend=original)
    handle = patch(model)
    assert model[0].attend is model[1].attend is model.spare.keywords["attend"]
    assert handle.replaced == 1
    assert handle.outcomes[0].paths == ("0.attend", "1.attend", "spare.keywords['attend']")
    assert "0.attend (+2 more)" in str(handle)
    handle.restore()
    assert model[0].attend is model[1].attend is model.spare.keywords["attend"] is original


def test_a_tuple_that_two_attributes_share_is_changed_in_both():
    pair = (fake_known(NATURALSPEECH2),)
    model = nn.Module()
    model.a, model.b = pair, pair
    patch(model)
    assert isinstance(model.a[0], Attend)
    assert model.a[0] is model.b[0]


def test_a_partial_stays_the_same_object_and_keeps_the_rest():
    model = nn.Module()
    model.held = held = functools.partial(call_first, fake_known(NATURALSPEECH2), 1, x=2)
    held.note = "kept"
    patch(model)
    assert model.held is held
    assert (held.func, held.args[1:], held.keywords, held.note) == (call_first, (1,), {"x": 2}, "kept")


def test_a_partial_that_holds_two_gets_both_replaced():
    first, second = fake_known(NATURALSPEECH2), fake_known(NATURALSPEECH2, causal=True)
    model = nn.Module()
    model.held = functools.partial(call_first, first, attend=second)
    handle = patch(model)
    assert isinstance(model.held.args[0], Attend)
    assert isinstance(model.held.keywords["attend"], Attend)
    assert (model.held.args[0].causal, model.held.keywords["attend"].causal) == (False, True)
    handle.restore()
    assert model.held.args[0] is first
    assert model.held.keywords["attend"] is second


def test_objects_that_are_no_part_of_a_model_are_not_entered():
    class Trainer:
        def __init__(self) -> None:
            self.other_model = Holder(fake_known(NATURALSPEECH2))

    model = Holder(fake_known(NATURALSPEECH2))
    model.trainer = Trainer()
    assert patch(model).replaced == 1
    assert not isinstance(model.trainer.other_model.attend, Attend)


def test_an_empty_cell_is_no_obstacle():
    def outer():
        def inner():
            return later

        yield inner
        later = 1

    model = Holder(fake_known(NATURALSPEECH2))
    model.unfinished = next(outer())
    assert patch(model).replaced == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


def test_options_and_state_are_kept():
    original = fake_known(COMPLEX, causal=True, dropout=0.25, scale=0.5).eval()
    model = Holder(original)
    patch(model)
    assert (model.attend.causal, model.attend.dropout, model.attend.scale) == (True, 0.25, 0.5)
    assert not model.attend.training
    assert not model.attend.attn_dropout.training
    model.train()
    assert model.attend.attn_dropout.training


def test_outside_the_module_tree_eval_does_not_reach_it_before_or_after():
    model = nn.Module()
    model.held = [fake_known(NATURALSPEECH2, dropout=0.5)]
    model.eval()
    handle = patch(model)
    model.eval()
    assert model.held[0].training
    assert model.held[0].attn_dropout.training
    handle.restore()
    assert model.held[0].training


@pytest.mark.parametrize(("flash", "kept"), [(False, 0.5), (True, 0.1)])
def test_dropout_is_the_one_that_was_in_force(flash, kept):
    original = fake_known(NATURALSPEECH2, dropout=0.1, use_flash=flash)
    original.attn_dropout.p = 0.5  # the einsum path reads this one, the flash path the other
    model = Holder(original)
    patch(model)
    assert model.attend.dropout == kept


def test_a_dropout_layer_in_a_mode_of_its_own_stays_in_it():
    original = fake_known(NATURALSPEECH2, dropout=0.1).eval()
    original.attn_dropout.train()
    model = Holder(original)
    patch(model)
    assert model.attend.attn_dropout.training
    assert not model.attend.training


@pytest.mark.parametrize("flash", [False, True])
def test_the_fastest_backend_serves_whatever_the_flag_was(flash):
    model = Holder(fake_known(NATURALSPEECH2, use_flash=flash))
    patch(model)
    assert model.attend.flash
    assert model.attend.backend == "auto"


@pytest.mark.parametrize("flash", [False, True])
def test_the_flag_is_kept_on_request(flash):
    model = Holder(fake_known(NATURALSPEECH2, use_flash=flash))
    patch(model, keep_flash=True)
    assert model.attend.use_flash is flash


def test_backend_and_determinism_are_passed_on():
    model = Holder(fake_known(NATURALSPEECH2))
    patch(model, backend="math", deterministic=True)
    assert (model.attend.backend, model.attend.deterministic) == ("math", True)


def test_keeping_flash_false_refuses_a_backend_that_contradicts_it():
    model = Holder(fake_known(NATURALSPEECH2, use_flash=False))
    assert "flash=False asks for the einsum path" in refusal(model, keep_flash=True, backend="triton")


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

SERVED = [path for path in KNOWN if path != X_TRANSFORMERS]


def served(path: str, **options: Any) -> nn.Module:
    """A fake of a known class in a form that is served."""
    return fake_known(path, **({KNOWN[path].flash: True} if KNOWN[path].replacement is NoBiasAttend else {}), **options)


@pytest.mark.parametrize("path", SERVED)
def test_known_classes_are_replaced(path):
    options = {"dropout": 0.25, "causal": True, "scale": 0.4, "heads": 4}
    original = served(path, **{name: value for name, value in options.items() if name in KNOWN[path].options})
    model = Holder(original.eval())
    arguments = {}
    if "mask" in KNOWN[path].arguments:
        arguments["mask"] = PADDING[:, None, None, :] if path == COMPLEX else PADDING
    if "attn_bias" in KNOWN[path].arguments:
        arguments["attn_bias"] = None
        expected = model(*inputs(), mask=arguments["mask"])
    else:
        expected = model(*inputs(), **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = patch(model, strict=True)
    assert handle.replaced == 1
    assert handle.outcomes[0].kind == path
    assert model.attend.dropout == (0.25 if "dropout" in KNOWN[path].options else 0.0)
    assert_same(model(*inputs(), **arguments), expected)


def test_every_row_says_which_version_was_read():
    assert all(row.read for row in KNOWN.values())


def test_grouped_heads_keep_their_order():
    original = fake_known("spear_tts_pytorch.attend.Attend", causal=True)
    q, k, v = inputs(heads=6, kv_heads=2)
    expected = original(q, *(x.repeat(1, 3, 1, 1) for x in (k, v)), mask=PADDING)
    model = Holder(original)
    patch(model)
    assert isinstance(model.attend, TiledHeadsAttend)
    assert_same(model(q, k, v, mask=PADDING), expected)
    per_head = torch.rand(2, 6, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    per_head[..., 0] = True
    expected = original(q, *(x.repeat(1, 3, 1, 1) for x in (k, v)), mask=per_head)
    assert_same(model(q, k, v, mask=per_head), expected)


@pytest.mark.parametrize("path", ["soundstorm_pytorch.attend.Attend", "audiolm_pytorch.attend.Attend"])
def test_a_bias_is_served_only_where_there_can_be_none(path):
    model = Holder(fake_known(path, flash=True))
    patch(model)
    with pytest.raises(ValueError, match="attn_bias must be None"):
        model(*inputs(), attn_bias=torch.zeros(6, 6))
    assert "flash=False: its calls may carry attn_bias" in refusal(Holder(fake_known(path, flash=False)))


def test_recurrent_memory_with_flash_and_causal_is_refused():
    path = "recurrent_memory_transformer_pytorch.attend.Attend"
    model = Holder(fake_known(path, use_flash=True, causal=True))
    assert "use_flash=True with causal=True" in refusal(model)


def test_top_left_alignment_is_noted():
    model = Holder(fake_known(NATURALSPEECH2, use_flash=True, causal=True))
    assert (
        patch(model).outcomes[0].reason == "where i != j, its flash path aligned causal top-left; ours is bottom-right"
    )
    for options in ({"use_flash": True}, {"causal": True}):
        assert patch(Holder(fake_known(NATURALSPEECH2, **options))).outcomes[0].reason == ""


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (COMPLEX, "its flash path ignores it"),
        ("iTransformer.attend.Attend", "its flash path ignores it"),
        ("denoising_diffusion_pytorch.attend.Attend", r"its flash path applies scale \* d \*\* -1.5"),
    ],
)
def test_a_scale_that_the_flash_path_mistreats_is_kept_with_a_warning(path, told):
    model = Holder(fake_known(path, scale=0.5, flash=True))
    with pytest.warns(UserWarning, match=f"scale = 0.5 applies from now on: {told}"):
        handle = patch(model)
    assert model.attend.scale == 0.5
    assert "scale = 0.5 applies from now on" in handle.outcomes[0].reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(Holder(fake_known(path, flash=True)))
        patch(Holder(fake_known(path, scale=0.5, flash=False)))


def test_a_class_can_be_registered(monkeypatch):
    class Renamed(fake("another_package.layers.Attention", arguments=("mask", "rotary"))):
        pass

    Renamed.__module__, Renamed.__qualname__ = "another_package.layers", "Renamed"
    Renamed.forward = lambda self, q, k, v, mask=None, rotary=None: plain_attention(self, q, k, v, mask)
    Renamed.forward.__module__ = "another_package.layers"
    Renamed.__init__ = lambda self, causal=False: nn.Module.__init__(self) or setattr(self, "causal", causal)

    with pytest.warns(UserWarning, match="found no Attend"):
        patch(Holder(Renamed(True)))
    monkeypatch.delitem(KNOWN, "another_package.layers.Renamed", raising=False)
    row = KnownAttend("another_package.layers.Renamed", options={"causal"}, arguments=("mask", "rotary"))
    assert register(row) is row
    model = Holder(Renamed(True))
    assert patch(model).replaced == 1
    assert model.attend.causal
    del KNOWN["another_package.layers.Renamed"]


def test_registering_something_else_is_refused():
    with pytest.raises(TypeError, match="row must be a KnownAttend, got str"):
        register("some_package.attend.Attend")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_x_transformers_is_refused_with_what_is_missing():
    options = {
        "dropout": 0.0,
        "causal": False,
        "heads": None,
        "pre_talking_heads": False,
        "sparse_topk": None,
        "scale": None,
        "flash": False,
        "softclamp_logits": False,
        "logit_softclamp_value": 50.0,
        "sigmoid": False,
    }
    kind = fake(X_TRANSFORMERS, options, ("mask", "attn_bias", "prev_attn"))
    reason = refusal(Holder(kind(softclamp_logits=True, sparse_topk=8, causal=True, heads=4)))
    assert "returns (out, intermediates)" in reason
    assert "attn_bias" in reason
    assert "softclamp_logits=True" in reason
    assert "sparse_topk=8" in reason
    assert "sigmoid" not in reason
    assert "logit_softclamp_value" not in reason
    plain = kind()
    plain.pre_softmax_talking_heads = nn.Conv2d(4, 4, 1)
    assert "pre_softmax_talking_heads" in refusal(Holder(plain))


def with_hook(register_hook: Callable[[nn.Module], Any]) -> nn.Module:
    attend = fake_known(NATURALSPEECH2)
    register_hook(attend)
    return attend


def changed(**attributes: Any) -> nn.Module:
    attend = fake_known(COMPLEX)
    for name, value in attributes.items():
        setattr(attend, name, value)
    return attend


def subclass() -> nn.Module:
    kind = fake(NATURALSPEECH2, {"dropout": 0.0, "causal": False, "use_flash": False})
    return type("Attend", (kind,), {"__module__": "my_package", "forward": lambda self, q, k, v, mask=None: v})()


def compiled() -> nn.Module:
    attend = fake_known(NATURALSPEECH2)
    attend.compile(backend="eager")
    return attend


def foreign_forward() -> nn.Module:
    attend = fake_known(NATURALSPEECH2)
    type(attend).forward = lambda self, q, k, v, mask=None: v
    return attend


REFUSED = {
    "dropout of 1": (lambda: changed(dropout=1.0, flash=True), r"dropout must be in [0, 1), got 1.0"),
    "learned scale": (lambda: changed(scale=torch.ones(())), "scale must be a Python number, got Tensor"),
    "infinite scale": (lambda: changed(scale=float("inf")), "scale must be finite, got float inf"),
    "causal that is no bool": (lambda: changed(causal=None), "causal must be a bool, got NoneType"),
    "a parameter": (lambda: changed(temperature=nn.Parameter(torch.ones(1))), "it holds temperature"),
    "a submodule": (lambda: changed(norm=nn.LayerNorm(8)), "it holds norm"),
    "another dropout": (lambda: changed(attn_dropout=nn.AlphaDropout()), "its attn_dropout is a AlphaDropout"),
    "replaced forward": (lambda: changed(forward=lambda q, k, v, mask=None: v), "its forward was replaced on this"),
    "replaced forward of the class": (foreign_forward, "its forward was replaced by one from"),
    "compiled": (compiled, "compiled on its own"),
    "forward hook": (lambda: with_hook(lambda a: a.register_forward_hook(print)), "hooks, which would be lost"),
    "pre-hook": (lambda: with_hook(lambda a: a.register_forward_pre_hook(print)), "forward_pre_hooks"),
    "backward hook": (lambda: with_hook(lambda a: a.register_full_backward_hook(print)), "backward_hooks"),
    "hook of the dropout": (lambda: with_hook(lambda a: a.attn_dropout.register_forward_hook(print)), "hooks"),
    "state dict hook": (lambda: with_hook(lambda a: a.register_state_dict_pre_hook(print)), "state_dict_pre_hooks"),
    "subclass of a known class": (subclass, f"it is a subclass of {NATURALSPEECH2}"),
    "option of a newer version": (
        lambda: fake(NATURALSPEECH2, {"dropout": 0.0, "causal": False, "use_flash": False, "qk_norm": True})(),
        "option qk_norm=True is not supported; these are: causal, dropout, use_flash",
    ),
    "argument of a newer version": (
        lambda: fake(NATURALSPEECH2, {"dropout": 0.0, "causal": False, "use_flash": False}, ("mask", "attn_bias"))(),
        "its forward takes (q, k, v, mask, attn_bias); supported is (q, k, v, mask)",
    ),
    "unknown option": (lambda: fake(options={"causal": False, "alibi": True})(), "option alibi=True is not supported"),
    "unknown argument": (
        lambda: fake(arguments=("mask", "rel_pos"))(),
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
    assert told in refusal(Holder(make()))


def test_a_method_that_the_replacement_lacks_is_refused():
    attend = fake_known(NATURALSPEECH2)

    def get_mask(self):
        raise AssertionError("not called")

    type(attend).get_mask = get_mask
    model = Holder(attend)
    model.held = attend.get_mask
    assert "held holds its method get_mask" in refusal(model)


def test_an_attend_in_a_compiled_wrapper_is_refused():
    model = nn.Module()
    model.attend = torch.compile(fake_known(NATURALSPEECH2), backend="eager")
    assert "compiled on its own; patch before compiling" in refusal(model)


def test_the_others_are_replaced_beside_a_refused_one():
    model = nn.ModuleList([fake_known(NATURALSPEECH2), foreign_forward()])
    with pytest.warns(UserWarning, match="patch left 1 "):
        handle = patch(model)
    assert (handle.replaced, handle.refused) == (1, 1)
    assert isinstance(model[0], Attend)
    assert not isinstance(model[1], Attend)


# ---------------------------------------------------------------------------------------------------------------------
# Classes that have no row
# ---------------------------------------------------------------------------------------------------------------------


def cosine(attend, q, k, v, mask=None):
    return plain_attention(attend, *(nn.functional.normalize(x, dim=-1) for x in (q, k)), v, mask)


def clamped(attend, q, k, v, mask=None):
    scores = (q @ k.mT * q.shape[-1] ** -0.5).clamp(-20, 20)
    return scores.softmax(dim=-1) @ v


def tiled(attend, q, k, v, mask=None):
    return plain_attention(attend, q, *(x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v)), mask)


def reversed_mask(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, None if mask is None else mask.flip(-1))


def deaf(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v)


def by_pair(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, None if mask is None else mask.expand(2, 4, q.shape[2], k.shape[2]))


def top_left(attend, q, k, v, mask=None):
    if q.shape[2] == k.shape[2]:
        return plain_attention(attend, q, k, v, mask)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return plain_attention(SimpleNamespace(), q, k, v, seen[None, None])


def windowed(attend, q, k, v, mask=None):
    if q.shape[2] == k.shape[2]:
        return plain_attention(attend, q, k, v, mask)
    return plain_attention(attend, q, k[:, :, -2:], v[:, :, -2:])


def failing(attend, q, k, v, mask=None):
    raise RuntimeError("not today")


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"flash": True}, {"dropout": 0.5}, {"causal": True, "flash": True, "dropout": 0.5}]
)
def test_a_copy_of_a_known_class_is_replaced(options):
    model = Holder(fake()(**options).eval())
    expected = model(*inputs(), mask=PADDING)
    state = torch.get_rng_state()
    handle = patch(model, strict=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert handle.outcomes[0].reason == "not in the table of known classes; computes the same on small examples"
    assert_same(model(*inputs(), mask=PADDING), expected)
    assert model.attend.dropout == options.get("dropout", 0.0)
    assert not model.attend.training


def test_a_copy_with_a_scale_of_its_own_is_replaced():
    model = Holder(fake(options={"scale": None, "causal": False})(scale=-0.3, causal=True))
    expected = model(*inputs())
    patch(model, strict=True)
    assert_same(model(*inputs()), expected)


def test_a_copy_without_masks_is_replaced():
    model = Holder(fake(arguments=())())
    assert patch(model, strict=True).replaced == 1


def test_a_copy_that_reads_2d_masks_as_pairs_is_replaced_by_one_that_does():
    model = Holder(fake(compute=by_pair)())
    pairs = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = model(*inputs(), mask=pairs)
    patch(model, strict=True)
    assert isinstance(model.attend, BroadcastMaskAttend)
    assert_same(model(*inputs(), mask=pairs), expected)


def test_a_copy_that_aligns_top_left_is_noted():
    reason = patch(Holder(fake(compute=top_left)(causal=True)), strict=True).outcomes[0].reason
    assert "where i != j, its flash path aligned causal top-left" in reason


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (cosine, "it computes something else on a small example"),
        (clamped, "it computes something else with large scores"),
        (tiled, "it computes something else with grouped heads"),
        (reversed_mask, "it computes something else with a (b, j) mask"),
        (deaf, "it computes something else with a (b, j) mask"),
        (windowed, "it computes something else where i != j"),
        (lambda *inputs, mask=None: (plain_attention(*inputs, mask), None), "something else on a small example"),
        (failing, "it fails on a small example"),
    ],
)
def test_a_class_that_computes_something_else_is_refused(compute, told):
    assert told in refusal(Holder(fake(compute=compute)()))


def test_comparing_changes_nothing_in_the_original():
    original = fake()(dropout=0.5).train()
    patch(Holder(original))
    assert original.calls == 0
    assert original.training
    assert original.attn_dropout.training


# ---------------------------------------------------------------------------------------------------------------------
# The handle
# ---------------------------------------------------------------------------------------------------------------------


def test_the_report_shows_each_attend():
    model = nn.ModuleDict({"good": fake_known(COMPLEX, causal=True, scale=0.5, dropout=0.25), "bad": foreign_forward()})
    with pytest.warns(UserWarning, match="patch left bad"):
        handle = patch(model)
    head, good, bad, summary = str(handle).splitlines()
    assert head.split() == ["path", "class", "causal", "dropout", "scale", "status", "reason", "or", "note"]
    assert good.split() == ["good", COMPLEX, "True", "0.25", "0.5", "replaced"]
    assert bad.split()[:6] == ["bad", NATURALSPEECH2, "False", "0.0", "None", "refused"]
    assert "its forward was replaced" in bad
    assert summary == "1 replaced, 1 refused"


def test_restore_is_idempotent():
    original = fake_known(NATURALSPEECH2)
    model = Holder(original)
    handle = patch(model)
    handle.restore()
    patch(model)
    second = model.attend
    handle.restore()
    assert model.attend is second


def test_a_with_block_restores():
    original = fake_known(NATURALSPEECH2)
    model = Holder(original)
    with pytest.raises(RuntimeError, match="inside"), patch(model) as handle:
        assert isinstance(model.attend, Attend)
        assert handle.replaced == 1
        raise RuntimeError("inside")
    assert model.attend is original


def test_restore_leaves_alone_what_was_changed_since():
    model = nn.Module()
    model.a, model.b, model.c = (fake_known(NATURALSPEECH2) for _ in range(3))
    model.listed = [fake_known(NATURALSPEECH2)]
    original = model.a
    handle = patch(model)
    mine = Attend()
    model.b = mine
    del model.c
    model.listed.clear()
    handle.restore()
    assert model.a is original
    assert model.b is mine
    assert not hasattr(model, "c")
    assert model.listed == []


def test_restore_hands_back_train_and_eval():
    original = fake_known(NATURALSPEECH2, dropout=0.5)
    model = Holder(original)
    handle = patch(model)
    model.eval()
    handle.restore()
    assert not original.training
    assert not original.attn_dropout.training


def test_restore_drops_a_cached_mask():
    original = fake_known(NATURALSPEECH2)
    original.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool), persistent=False)
    patch(Holder(original)).restore()
    assert original.mask is None


def test_a_failure_half_way_leaves_the_model_as_it_was():
    class Stubborn(dict):
        def __setitem__(self, key, value):
            raise RuntimeError("read-only")

    original = fake_known(NATURALSPEECH2)
    model = Holder(original)
    model.stubborn = Stubborn(a=fake_known(NATURALSPEECH2))
    with pytest.raises(RuntimeError, match="read-only"):
        patch(model)
    assert model.attend is original


def test_patching_twice_changes_nothing_more():
    model = Holder(fake_known(NATURALSPEECH2))
    patch(model)
    first = model.attend
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = patch(model, strict=True)
    assert model.attend is first
    assert (again.replaced, again.refused) == (0, 0)
    assert again.outcomes[0].status == "ours already"


# ---------------------------------------------------------------------------------------------------------------------
# Nothing found, strictness, bad arguments
# ---------------------------------------------------------------------------------------------------------------------


def test_finding_nothing_warns():
    with pytest.warns(UserWarning, match="patch found no Attend in Linear"):
        handle = patch(nn.Linear(2, 2))
    assert (handle.replaced, handle.refused) == (0, 0)


def test_strict_raises_where_nothing_is_found():
    with pytest.raises(PatchError, match="no Attend found in Linear"):
        patch(nn.Linear(2, 2), strict=True)


def test_strict_raises_before_anything_is_changed():
    good = fake_known(NATURALSPEECH2)
    model = nn.ModuleDict({"good": good, "bad": foreign_forward()})
    with pytest.raises(PatchError, match=r"bad \(naturalspeech2_pytorch.attend.Attend\): its forward was replaced"):
        patch(model, strict=True)
    assert model["good"] is good


def test_an_attend_itself_cannot_be_patched():
    for attend in (fake_known(NATURALSPEECH2), ClientAttend(), Attend()):
        with pytest.raises(TypeError, match="model is itself an Attend"):
            patch(attend)


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
    model = Holder(fake_known(NATURALSPEECH2))
    with pytest.raises(error, match=told):
        patch(model, **options)
    assert not isinstance(model.attend, Attend)
