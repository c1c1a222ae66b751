"""Packages that have an Attend, or use x-transformers': their own classes and models, beside the same ones patched.

    python tests/integrations/packages.py

prints what became of each, and the largest difference of outputs and gradients, relative to the largest entry.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flash_attend import patch


@dataclass(frozen=True)
class Package:
    """One Attend or one model of a package, and what becomes of it."""

    name: str  # as it is imported
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    what: str = ""
    told: str = ""  # the note, or the reason where it is refused
    served: bool = True


@dataclass
class Comparison:
    """What `patch` did, and how far what is computed differs from before."""

    replaced: int = 0
    called: int = 0  # of those that were replaced
    refused: int = 0
    reasons: set[str] = field(default_factory=set)
    warned: list[str] = field(default_factory=list)
    output: float = 0.0
    gradient: float = 0.0


def compare(package: Package) -> Comparison:
    """Builds it, calls it, patches it and calls it again, in double precision where it can that."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = package.make()
    before = answers(package, model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        handle = patch(model)
    called: set[nn.Module] = set()
    for outcome in handle.outcomes:
        if outcome.status == "replaced":
            outcome.attend.register_forward_hook(lambda attend, *_: called.add(attend))
    after = answers(package, model)
    # A gradient that is next to nothing beside the others is rounding.
    least = 1e-3 * max(y.abs().max() for y in before)
    gaps = [((x - y).abs().max() / y.abs().max().maximum(least)).item() for x, y in zip(after, before, strict=True)]
    return Comparison(
        handle.replaced,
        len(called),
        handle.refused,
        {outcome.reason for outcome in handle.outcomes},
        [str(warning.message) for warning in told if str(warning.message).startswith("patch ")],
        gaps[0],
        max(gaps[1:]),
    )


def answers(package: Package, model: nn.Module) -> list[Tensor]:
    """The output and the gradients of parameters, or of what an Attend is called with."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flash paths call what torch has deprecated
        returned = package.call(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    out, leaves = returned if isinstance(returned, tuple) else (returned, learned)
    weights = torch.linspace(0.5, 1.0, out.numel(), dtype=out.dtype).view(out.shape)
    gradients = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    return [out.detach(), *(x for x in gradients if x is not None)]


# ---------------------------------------------------------------------------------------------------------------------
# Classes, from the file in which they are: their packages need others by the dozen
# ---------------------------------------------------------------------------------------------------------------------


def attend_of(package: str, file: str = "attend", kind: str = "Attend", **options: Any) -> nn.Module:
    """An Attend of a package, of which nothing else is loaded."""
    name = f"{package}.{file}"
    if name not in sys.modules:
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        spec = importlib.util.spec_from_file_location(name, Path(folder) / f"{file}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(sys.modules[name], kind)(**options)


def attends(
    kv_heads: int | None = 4, dtype: torch.dtype = torch.float64, **given: Callable[[], Tensor]
) -> Callable[[nn.Module], tuple[Tensor, list[Tensor]]]:
    """A call of an Attend with masks or biases; what it gives, and what a gradient is asked for."""

    def call(attend: nn.Module) -> tuple[Tensor, list[Tensor]]:
        kv = (2, 6, 8) if kv_heads is None else (2, kv_heads, 6, 8)
        leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 4, 6, 8), kv, kv)]
        others = {name: make() for name, make in given.items()}
        biases = [value.requires_grad_() for value in others.values() if value.is_floating_point()]
        return attend(*leaves, **others), leaves + biases

    return call


def padding() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)


def padding_4d() -> Tensor:
    return padding()[:, None, None]


def bias() -> Tensor:
    return torch.randn(4, 6, 6, dtype=torch.float64)


def classes() -> list[Package]:
    """The Attends of packages that have one of their own."""

    def one(name: str, call: Callable[[Any], Any], told: str = "", served: bool = True, **options: Any) -> Package:
        where = {key: options.pop(key) for key in ("file", "kind") if key in options}
        what = ", ".join(f"{key}={value}" for key, value in options.items())
        return Package(name, lambda: attend_of(name, **where, **options), call, f"Attend({what})", told, served)

    top_left = "where i != j, its flash path aligned causal top-left; ours is bottom-right"
    unknown = "not in the table of known classes; computes the same on examples"
    each, shared = attends(mask=padding), attends(None, mask=padding)
    found = []
    for name in ("audiolm_pytorch", "audiolm_superfeel", "soundstorm_pytorch", "soundstorm_superfeel"):
        note = "" if name.endswith("pytorch") else unknown
        found += [
            one(name, attends(None, mask=padding, attn_bias=bias), note, causal=True),
            one(name, attends(None), "; ".join(filter(None, (note, top_left))), causal=True, flash=True),
        ]
    return [
        *found,
        one("magvit2_pytorch", attends(mask=padding_4d, attn_bias=bias), unknown, causal=True),
        one("muse_maskgit_pytorch", attends(mask=padding_4d), "", flash=False),
        one("muse_maskgit_pytorch", attends(dtype=torch.float32, mask=padding_4d), flash=True),
        one("rin_pytorch", each, unknown),
        one("rin_pytorch", each, unknown, flash=True),
        one("rin_pytorch", each, "option inverted_attention=True is not supported", False, inverted_attention=True),
        one("vit_pytorch", attends(), unknown, file="simple_flash_attn_vit_3d", use_flash=True),
        one("vit_pytorch", attends(), unknown, file="simple_flash_attn_vit", use_flash=True),
        one("MEGABYTE_pytorch", attends(None), "", causal=True),
        one("MEGABYTE_pytorch", attends(None), top_left, causal=True, flash=True),
        one("make_a_video_pytorch", attends(bias=bias), unknown, causal=True),
        one("make_a_video_pytorch", attends(), unknown, flash=True),
        one("voicebox_pytorch", each),
        one("gigagan_pytorch", attends()),
        one("iTransformer", attends()),
        one("denoising_diffusion_pytorch", attends(), flash=True),
        one("classifier_free_guidance_pytorch", shared),
        one("spear_tts_pytorch", attends(2, mask=padding), causal=True),
        one("simple_hierarchical_transformer", each, file="attention", causal=True),
        one("palm_rlhf_pytorch", shared, file="attention", kind="Attention", causal=True),
        one("naturalspeech2_pytorch", each, causal=True),
        one("naturalspeech2_pytorch", attends(), top_left, causal=True, use_flash=True),
        one("recurrent_memory_transformer_pytorch", each, causal=True),
        one(
            "recurrent_memory_transformer_pytorch",
            attends(),
            "use_flash=True with causal=True",
            False,
            causal=True,
            use_flash=True,
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


class StandIn(ModuleType):
    """A module that has whatever is imported from it: a class of that name, which is good for nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        return type(name, (), {"__init__": lambda self, *inputs, **named: None})


@contextmanager
def standing_in(*names: str) -> Any:
    """For packages that are imported and not needed by what is called here."""
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update({name: StandIn(name) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def module(name: str, *missing: str) -> Any:
    with standing_in(*missing):
        return importlib.import_module(name)


CALLED = "what a call says of causal holds: its flash path ignores it"
TRAINERS = ("accelerate", "accelerate.utils", "ema_pytorch", "torchvision.transforms")


def models() -> list[Package]:
    """Models that need little beside the package."""

    def tokens(model: nn.Module) -> Tensor:
        return model(torch.arange(24).reshape(2, 12) * 7 % 32)

    def bs_roformer(**options: Any) -> nn.Module:
        model = module("bs_roformer", "librosa").BSRoformer(
            dim=16, depth=1, time_transformer_depth=1, freq_transformer_depth=1, heads=2, dim_head=8, **options
        )
        return model

    def mmdit(**options: Any) -> nn.Module:
        return module("mmdit.mmdit_pytorch").JointAttention(dim_inputs=(16, 12), heads=2, dim_head=8, **options)

    def autoregressive_diffusion() -> nn.Module:
        package = module(
            "autoregressive_diffusion_pytorch", "torchvision", "torchvision.utils", "torchdiffeq", *TRAINERS
        )
        model = package.AutoregressiveDiffusion(16, max_seq_len=8, depth=2, heads=2, dim_head=8, dim_input=8)
        return model

    def titans(**options: Any) -> nn.Module:
        return module("titans_pytorch").MemoryAsContextTransformer(
            num_tokens=32,
            dim=16,
            depth=2,
            heads=2,
            dim_head=8,
            segment_len=4,
            num_persist_mem_tokens=2,
            num_longterm_mem_tokens=2,
            neural_memory_layers=(),
            **options,
        )

    def q_transformer(**options: Any) -> nn.Module:
        missing = ("classifier_free_guidance_pytorch", "hl_gauss_pytorch", "adam_atan2_pytorch", *TRAINERS)
        package = module("q_transformer.q_robotic_transformer", *missing)
        return package.Transformer(16, dim_head=8, heads=2, depth=2, **options)

    def megabyte(**options: Any) -> nn.Module:
        sizes = dict(dim=(16, 8), depth=(1, 1), max_seq_len=(4, 3), dim_head=8, heads=2)
        return module("MEGABYTE_pytorch").MEGABYTE(num_tokens=32, **sizes, **options)

    def rin() -> nn.Module:
        package = module("rin_pytorch", "torchvision", "torchvision.utils", *TRAINERS)
        return package.RIN(16, 8, patch_size=2, depth=1, num_latents=4, latent_self_attn_depth=1)

    inputs = SimpleNamespace(
        sound=lambda model: model(torch.randn(1, 2048)),
        mixed=lambda model: torch.cat(
            [x.flatten() for x in model((torch.randn(2, 6, 16), torch.randn(2, 5, 12)), masks=(padding(), None))]
        ),
        sequence=lambda model: model(torch.randn(2, 8, 8)),
        states=lambda model: model(torch.randn(2, 6, 16)),
        image=lambda model: model(torch.randn(2, 3, 8, 8), torch.rand(2)),
    )
    return [
        Package("bs_roformer", bs_roformer, inputs.sound, "BSRoformer"),
        Package("bs_roformer", lambda: bs_roformer(use_pope=True), inputs.sound, "use_pope", "it is not called while"),
        Package("mmdit", lambda: mmdit(flash=True), inputs.mixed, "JointAttention", CALLED),
        Package("mmdit", lambda: mmdit(softclamp=True), inputs.mixed, "JointAttention, softclamp"),
        Package("autoregressive_diffusion_pytorch", autoregressive_diffusion, inputs.sequence, "whole"),
        Package("titans_pytorch", titans, tokens, "MemoryAsContextTransformer"),
        Package("titans_pytorch", lambda: titans(sliding_window_attn=True), tokens, "sliding window"),
        Package("q_transformer", q_transformer, inputs.states, "Transformer"),
        Package("MEGABYTE_pytorch", megabyte, tokens, "MEGABYTE"),
        Package("rin_pytorch", rin, inputs.image, "RIN"),
    ]


def main() -> None:
    only = sys.argv[1] if sys.argv[1:] else ""
    print("| package | version | what | served | largest difference of outputs, gradients | why, or a note |")
    print("| --- | --- | --- | --- | --- | --- |")
    for package in [one for one in (*classes(), *models()) if only in f"{one.name} {one.what}"]:
        try:
            found = compare(package)
        except Exception as error:
            print(f"| {package.name} | | {package.what} | not tried: {type(error).__name__}: {error} | | |", flush=True)
            continue
        version = importlib.metadata.version(package.name.replace("_", "-"))
        served = f"{found.replaced} served"
        served += f", {found.called} called" if found.called < found.replaced else ""
        served += f", {found.refused} refused" if found.refused else ""
        told = "; ".join(sorted(found.reasons))
        row = (package.name, version, package.what, served, f"{found.output:.0e}, {found.gradient:.0e}", told)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
