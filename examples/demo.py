"""Trains a real model on real text, with its own `Attend` and with ours, from the same seed and the same batches.

The model is complex-valued-transformer's, the text is the source of Python's standard library, byte by byte. Run it
with `make demo`, or with `python examples/demo.py --help` where the package's extra `demo` is installed.

The two trainings run in step. They may differ by rounding, which training amplifies; `bound` says by how much.

For the losses to show a wrong scale, mask or causal rule, the attention must have weight in them. The client's RMS norm
gives vectors of RMS gamma / dim, which with its gamma of 1 makes the attention's part so small that one which looked
into the future would pass unnoticed. So gamma starts at dim in the norms before the attention and before the logits, in
both trainings.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import flash_attend
from flash_attend.backends import BACKENDS
from flash_attend.testing.memory import peak_bytes

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("own", "ours")
COMPLETE = (
    "the complete complex form"  # eight attentions in one, which the client computes on four copies of q, k and v
)
# What is compared: the title, and the setting that says for how many steps.
SECTIONS = {"no padding": "steps", "with key padding": "padded_steps", COMPLETE: "complete_steps"}
EPS = torch.finfo(torch.float32).eps
DIM_HEAD = 32  # complex numbers
# The losses may differ by so many float32 roundings at first, and by twice as many every so many steps: this model
# amplifies rounding, for its ModReLU takes the angle of numbers near zero. Measured on a CPU in 13 trainings of 60
# steps, of dim 64 and 128: nudging the output of the client's own Attend by half a rounding, at random, takes the loss
# at most a fifth of that away. A scale that is wrong by a tenth takes it five times that away, in the first step.
ROUNDINGS = 64
DOUBLING = 8
# What takes about a minute on two CPU cores, and what gives a GPU something to do.
SIZES = {
    "cpu": dict(steps=60, padded_steps=20, complete_steps=6, batch=4, length=192, dim=64, depth=2, heads=4),
    "cuda": dict(steps=60, padded_steps=20, complete_steps=20, batch=8, length=1024, dim=128, depth=4, heads=8),
}
SMALLEST = {"padded_steps": 0, "complete_steps": 0, "length": 2}  # 1 of everything else


class Batches:
    """Windows of `length + 1` bytes at places that the seed decides, the same for both arms."""

    def __init__(self, settings: argparse.Namespace, title: str) -> None:
        padded = title == "with key padding"
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = bytearray(b"".join(file.read_bytes() for file in files))
        self.corpus = torch.frombuffer(text, dtype=torch.uint8)
        if settings.length >= len(self.corpus):
            raise SystemExit(f"--length must be below the text's {len(self.corpus)} bytes, got {settings.length}")
        generator = torch.Generator().manual_seed(settings.seed)
        size = (getattr(settings, SECTIONS[title]), settings.batch)
        self.starts = torch.randint(len(self.corpus) - settings.length, size, generator=generator)
        shortest = max(1, settings.length // 4)
        self.lengths = torch.randint(shortest, settings.length + 1, size, generator=generator) if padded else None
        self.window = torch.arange(settings.length + 1)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Bytes `(b, n + 1)`, and the key padding `(b, 1, 1, n)` of a padded batch, whose rest is filled with 0."""
        tokens = self.corpus[self.starts[step][:, None] + self.window].long()
        if self.lengths is None:
            return tokens, None
        valid = self.window < self.lengths[step][:, None]  # (b, n + 1)
        return tokens.masked_fill(~valid, 0), valid[:, None, None, :-1]


def build_model(settings: argparse.Namespace, flash: bool, complete: bool) -> nn.Module:
    """The client's model, wrapped for next-byte prediction, the same for both arms."""
    from complex_valued_transformer import ComplexTransformer
    from complex_valued_transformer.autoregressive_wrapper import AutoregressiveWrapper

    sizes = dict(dim=settings.dim, depth=settings.depth, heads=settings.heads, dim_head=DIM_HEAD)
    torch.manual_seed(settings.seed)
    net = ComplexTransformer(num_tokens=256, causal=True, flash_attn=flash, complete_complex=complete, **sizes)
    for norm in (net.norm, *(layer[0] for layer in net.layers)):
        nn.init.constant_(norm.gamma, settings.dim)
    return AutoregressiveWrapper(net, seq_len=settings.length).to(settings.device)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor | None]) -> Tensor:
    """The mean over all bytes, in nats."""
    device = next(model.parameters()).device
    tokens, mask = batch
    masked = {} if mask is None else {"mask": mask.to(device)}
    return model(tokens.to(device), return_real_logits=True, **masked)


# ---------------------------------------------------------------------------------------------------------------------
# One arm
# ---------------------------------------------------------------------------------------------------------------------


class Arm:
    """One training, step by step."""

    def __init__(self, kind: str, settings: argparse.Namespace, title: str) -> None:
        self.batches, self.complete = Batches(settings, title), title == COMPLETE
        self.flash, self.told = self._try_flash(settings)
        self.model = build_model(settings, self.flash, self.complete)
        self.device = torch.device(settings.device)
        if kind == "ours":
            patched = flash_attend.patch(self.model, backend=settings.backend, strict=True)
            self.told = f"\n{patched}\n{self._explain(settings)}"
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-4)

    def step(self, index: int) -> tuple[float, float]:
        """Trains on batch `index`; returns the loss and the seconds."""
        start = time.perf_counter()
        loss = loss_of(self.model, self.batches[index])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return value, time.perf_counter() - start

    def _try_flash(self, settings: argparse.Namespace) -> tuple[bool, str]:
        """Whether the client's flash path is asked for and can run here, and what is told of it."""
        if settings.no_client_flash:
            return False, "flash=False"
        tokens, mask = self.batches[0]
        small = tokens[:1, :17], None if mask is None else mask[:1, ..., :16]
        try:
            loss_of(build_model(settings, True, self.complete), small).backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return False, f"flash=False (flash=True fails here: {str(error).splitlines()[0]})"
        return True, "flash=True"

    def _explain(self, settings: argparse.Namespace) -> str:
        """How each backend judges this model's calls."""
        width = DIM_HEAD if self.complete else 2 * DIM_HEAD  # real and imaginary parts apart, or side by side
        q = torch.empty(settings.batch, settings.heads, settings.length, width, device=settings.device)
        _, mask = self.batches[0]
        mask = None if mask is None else torch.ones(settings.batch, settings.length, dtype=torch.bool, device=q.device)
        explanation = flash_attend.explain(q, q, q, mask=mask, causal=True, backend=settings.backend)
        if explanation.plan is None:
            raise SystemExit(str(explanation))
        return str(explanation)

    def measure_attention(self) -> dict[str, tuple[float, float, float]]:
        """The first layer's attention alone, on the last batch: how far own and ours are from float64.

        For the output and each gradient: the largest error of the client's Attend, by the worse of its paths that run
        here, of ours, and what is allowed.
        """
        from complex_valued_transformer import ComplexMultiheadAttention
        from complex_valued_transformer.attend import Attend

        layer = next(module for module in self.model.modules() if isinstance(module, ComplexMultiheadAttention))
        ours = layer.attend.keywords["attend"]
        caught: list[Any] = []
        watch = ours.register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
        with torch.no_grad():
            loss_of(self.model, self.batches[len(self.batches.starts) - 1])
        watch.remove()
        inputs, keywords = caught[0]
        grad_out = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(0)).to(inputs[2].device)

        def run(attend: nn.Module, dtype: torch.dtype) -> list[Tensor]:
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out = attend(*leaves, **keywords)
            return [x.double() for x in (out, *torch.autograd.grad(out, leaves, grad_out.to(dtype)))]

        exact = run(Attend(causal=True), torch.float64)

        def errors(attend: nn.Module) -> list[float]:
            return [(x - y).abs().max().item() for x, y in zip(run(attend, torch.float32), exact, strict=True)]

        own = map(max, zip(*(errors(Attend(causal=True, flash=flash)) for flash in {False, self.flash}), strict=True))
        columns = [
            (theirs, error, 2 * theirs + EPS * y.abs().max().item())
            for theirs, error, y in zip(own, errors(ours), exact, strict=True)
        ]
        return dict(zip(("out", "dq", "dk", "dv"), columns, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


def bound(loss: float, step: int) -> float:
    """How far from this loss that of the other training may be, `step` counted from 0."""
    return ROUNDINGS * EPS * abs(loss) * 2 ** (step / DOUBLING)


@dataclass
class Section:
    """One comparison: what each arm did, step by step, and what it said at its end."""

    title: str
    losses: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in ARMS})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in ARMS})
    told: dict[str, str] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)
    errors: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # own, ours, allowed

    @property
    def steps(self) -> list[tuple[float, float, float, float]]:
        """Own loss, ours, how far they are apart, and how far they may be."""
        pairs = enumerate(zip(self.losses["own"], self.losses["ours"], strict=True))
        return [(own, ours, abs(own - ours), bound(own, step)) for step, (own, ours) in pairs]

    def complaints(self) -> list[str]:
        """What is wrong; nothing if the two agree."""
        found = [
            f"{self.title}: the losses of step {step} differ by {apart:.1e}, allowed is {allowed:.1e}"
            for step, (_, _, apart, allowed) in enumerate(self.steps, start=1)
            if not apart <= allowed  # NaN too
        ][:1]
        return found + [
            f"{self.title}: {name} is {ours:.1e} from float64, the client's own is {own:.1e}"
            for name, (own, ours, allowed) in self.errors.items()
            if not ours <= allowed
        ]

    def __str__(self) -> str:
        table = [("", "own Attend", "flash_attend", "difference", "allowed")]
        numbered = list(enumerate(self.steps, start=1))
        last = len(numbered) - 1
        for step, (own, ours, apart, allowed) in (numbered[i] for i in sorted({round(x * last / 6) for x in range(7)})):
            table.append((f"loss, step {step}", f"{own:.6f}", f"{ours:.6f}", f"{apart:.1e}", f"{allowed:.1e}"))
        step, (_, _, apart, allowed) = max(numbered, key=lambda item: item[1][2])
        table.append((f"largest, step {step}", "", "", f"{apart:.1e}", f"{allowed:.1e}"))
        for name, (own, ours, allowed) in self.errors.items():
            table.append((f"{name} against float64", f"{own:.1e}", f"{ours:.1e}", "", f"{allowed:.1e}"))
        own, ours = (statistics.median(self.seconds[kind][1:] or self.seconds[kind]) for kind in ARMS)
        table.append(("seconds a step", f"{own:.4f}", f"{ours:.4f}", f"own/ours {own / ours:.2f}", ""))
        table.append(("first step", *(f"{self.seconds[kind][0]:.4f}" for kind in ARMS), "", ""))
        table.append(("memory of a step, MB", *(f"{self.megabytes[kind]:.1f}" for kind in ARMS), "", ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        told = [f"own Attend: {self.told['own']}", f"flash_attend: {self.told['ours']}"]
        return "\n".join(["", self.title, "", lines[0], rule, *lines[1:], "", *told])


def compare(settings: argparse.Namespace, title: str) -> Section:
    """Trains both arms in step."""
    section = Section(title)
    arms = {kind: Arm(kind, settings, title) for kind in ARMS}
    steps = range(getattr(settings, SECTIONS[title]))
    for step in tqdm(steps, desc=f"training, {section.title}", unit="step"):
        for kind in ARMS[:: -1 if step % 2 else 1]:  # both are first and second equally often
            loss, spent = arms[kind].step(step)
            section.losses[kind].append(loss)
            section.seconds[kind].append(spent)
    section.errors = arms["ours"].measure_attention()
    for kind, arm in arms.items():
        section.told[kind] = arm.told
        section.megabytes[kind] = peak_bytes(partial(arm.step, steps[-1]), arm.device) / 1e6
    return section


def draw(sections: Sequence[Section], path: Path) -> None:
    """Both loss curves of each section, and below them their difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(sections), 7), layout="constrained")
    axes = figure.subplots(2, len(sections), squeeze=False, sharex="col")
    for (upper, lower), section in zip(axes.T, sections, strict=True):
        own, ours, apart, allowed = zip(*section.steps, strict=True)
        upper.plot(own, label="own Attend", linewidth=3, alpha=0.4)
        upper.plot(ours, label="flash_attend", linestyle="--", color="black")
        upper.set(title=section.title, ylabel="loss (nats a byte)")
        lower.plot(apart, label="|own - flash_attend|", color="black", marker=".")
        lower.plot(allowed, label="allowed", color="tab:red", linestyle=":")
        lower.set_yscale("symlog", linthresh=1e-7)
        lower.set(xlabel="step", ylabel="difference of the losses", ylim=(0, None))
        upper.legend()
        lower.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The settings, and as `out` where the plot goes."""
    parser = argparse.ArgumentParser(
        description="Trains complex-valued-transformer on the standard library's source, with its own Attend and ours.",
        epilog="Sizes default to what suits the device: " + "; ".join(f"{kind}: {s}" for kind, s in SIZES.items()),
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="ours")
    parser.add_argument("--no-client-flash", action="store_true", help="build the client's model with flash_attn=False")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo.png", help="where the plot goes")
    settings = parser.parse_args(argv)
    if settings.device not in SIZES or (settings.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device must be cpu, or cuda where torch sees a GPU, got {settings.device}")
    for name, usual in SIZES[settings.device].items():
        size, smallest = getattr(settings, name), SMALLEST.get(name, 1)
        if size is None:
            setattr(settings, name, usual)
        elif size < smallest:
            parser.error(f"--{name.replace('_', '-')} must be at least {smallest}, got {size}")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if both trainings agree, 1 if they do not."""
    settings = parse_arguments(argv)
    warnings.filterwarnings("ignore", message=".*sdp_kernel.*")  # the client's flash path calls what torch deprecates
    with redirect_stdout(sys.stderr):  # what the client prints must not come between the lines of the tables
        sections = [compare(settings, title) for title, steps in SECTIONS.items() if getattr(settings, steps)]
    print(
        f"\ncomplex-valued-transformer on {settings.device}: dim {settings.dim}, depth {settings.depth}, "
        f"{settings.heads} heads of {DIM_HEAD} complex numbers, batch {settings.batch}, length {settings.length}",
        *sections,
        "\nagainst float64: largest error of the attention alone, the client's by the worse of its two paths",
        "seconds: median without the first step; memory: allocated by torch at the highest, beyond what rests",
        sep="\n",
    )
    draw(sections, settings.out)
    print(f"plot: {settings.out}")
    complaints = [f"FAILED: {complaint}" for section in sections for complaint in section.complaints()]
    print(*(complaints or ["the two trainings agree to float32's rounding"]), sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler's own log off the screen
    torch.set_num_threads(1)  # the model is small
    sys.exit(main())
