"""Trains a real model on real text, with its own `Attend` and with ours, from the same seed and the same batches.

The model is complex-valued-transformer's, the text is the source of Python's standard library, byte by byte. Run it
with `make demo`, or with `python benchmarks/demo.py --help` where the package's extra `demo` is installed.

The two trainings run in step, each in a process of its own so that its memory is its own. They may differ by rounding,
which training amplifies; `Section.bounds` says by how much.

For the losses to show a wrong scale, mask or causal rule, the attention must have weight in them. The client's RMS norm
gives vectors of RMS gamma / dim, which with its gamma of 1 makes the attention's part so small that one which looked
into the future would pass unnoticed. So gamma starts at dim in the norms before the attention and before the logits, in
both trainings.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import flash_attend
from flash_attend.backends import BACKENDS
from flash_attend.explanation import Explanation

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("own", "ours")
EPS = torch.finfo(torch.float32).eps
DIM_HEAD = 32
LEARNING_RATE = 5e-4
# The losses may differ by so many float32 roundings at first, and by twice as many every so many steps: this model
# amplifies rounding, for its ModReLU takes the angle of numbers near zero. Measured on a CPU in 13 trainings of 60
# steps, of dim 64 and 128: nudging the output of the client's own Attend by half a rounding, at random, takes the loss
# at most a fifth of that away. A scale that is wrong by a tenth takes it five times that away, in the first step.
ROUNDINGS = 64
DOUBLING = 8
CORPUS_BYTES = 4_000_000


@dataclass(frozen=True)
class Settings:
    """What every arm must agree on."""

    steps: int
    padded_steps: int
    batch: int
    length: int
    dim: int
    depth: int
    heads: int
    seed: int
    device: str
    backend: str  # "auto" stands for the kernels wherever they can serve, a default there or not
    keep_flash: bool
    client_flash: bool


# What takes about a minute on two CPU cores, and what gives a GPU something to do.
SIZES = {
    "cpu": dict(steps=60, padded_steps=20, batch=4, length=192, dim=64, depth=2, heads=4),
    "cuda": dict(steps=60, padded_steps=20, batch=8, length=1024, dim=128, depth=4, heads=8),
}


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def read_corpus() -> Tensor:
    """The standard library's top-level modules, in the order of their names, as bytes: uint8 `(n,)`."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = bytearray(b"".join(file.read_bytes() for file in files)[:CORPUS_BYTES])
    if not text:
        raise SystemExit(f"no .py files in {sysconfig.get_path('stdlib')}, whose bytes are the text of this demo")
    return torch.frombuffer(text, dtype=torch.uint8)


class Batches:
    """Windows of `length + 1` bytes at places that the seed decides, the same for every arm."""

    def __init__(self, settings: Settings, padded: bool) -> None:
        self.corpus = read_corpus()
        if settings.length + 1 > len(self.corpus):
            raise SystemExit(f"--length must be below the text's {len(self.corpus)} bytes, got {settings.length}")
        generator = torch.Generator().manual_seed(settings.seed)
        size = (settings.padded_steps if padded else settings.steps, settings.batch)
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


# ---------------------------------------------------------------------------------------------------------------------
# One arm
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What an arm knows at its end."""

    peak_bytes: int | None
    attention: str  # who served it, and why
    report: str = ""  # patch's table
    errors: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # of out, dq, dk, dv: own, ours, floor


class Trainer(Protocol):
    """An arm, in this process or in another one."""

    def step(self, index: int) -> tuple[float, float]:
        """Trains on batch `index`; returns the loss and the seconds."""

    def finish(self) -> Summary:
        """Ends the arm."""


def build_model(settings: Settings, flash: bool) -> nn.Module:
    """The client's model, wrapped for next-byte prediction, the same for every arm."""
    from complex_valued_transformer import ComplexTransformer
    from complex_valued_transformer.autoregressive_wrapper import AutoregressiveWrapper

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = ComplexTransformer(
            num_tokens=256,
            dim=settings.dim,
            depth=settings.depth,
            heads=settings.heads,
            dim_head=DIM_HEAD,
            causal=True,
            flash_attn=flash,
        )
    for norm in (net.norm, *(layer[0] for layer in net.layers)):
        nn.init.constant_(norm.gamma, settings.dim)
    return AutoregressiveWrapper(net, seq_len=settings.length).to(settings.device)


def held_attends(model: nn.Module) -> list[nn.Module]:
    """The Attends of the client's attention layers, which hold them in a `functools.partial`."""
    from complex_valued_transformer import ComplexMultiheadAttention

    layers = (module for module in model.modules() if isinstance(module, ComplexMultiheadAttention))
    return [layer.attend.keywords["attend"] for layer in layers]


class Arm:
    """One training, step by step."""

    def __init__(self, kind: str, settings: Settings, padded: bool) -> None:
        self.kind, self.settings, self.padded = kind, settings, padded
        self.batches = Batches(settings, padded)
        self.flash, self.trouble = self._choose_flash()
        self.model = build_model(settings, self.flash)
        self.handle, self.explanation = None, None
        if kind == "ours":
            backend, self.explanation = self._choose_backend()
            self.handle = flash_attend.patch(self.model, backend=backend, keep_flash=settings.keep_flash, strict=True)
        else:
            # What patching compares takes memory, which should be at rest in both arms or in neither.
            flash_attend.patch(self.model).restore()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        _load_optimizer()
        _forget_peak()
        self.resting_bytes = _peak_resident_bytes()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(settings.device)

    def step(self, index: int) -> tuple[float, float]:
        """Trains on batch `index`; returns the loss and the seconds."""
        self._synchronize()
        start = time.perf_counter()
        loss = self._loss(self.model, self.batches[index])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        return loss.item(), time.perf_counter() - start

    def finish(self) -> Summary:
        """Measures what is left to measure."""
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated(self.settings.device)
        else:
            now = _peak_resident_bytes()
            peak = None if now is None else now - self.resting_bytes
        if self.kind != "ours":
            attention = f"the client's Attend, flash={self.flash}" + (f" ({self.trouble})" if self.trouble else "")
            return Summary(peak, attention)
        return Summary(peak, str(self.explanation), str(self.handle), self._measure_attention())

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.settings.device).type == "cuda"

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.settings.device)

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        tokens, mask = (t if t is None else t.to(self.settings.device) for t in batch)
        masked = {} if mask is None else {"mask": mask}
        return model(tokens, return_real_logits=True, **masked)

    def _choose_flash(self) -> tuple[bool, str]:
        """The client's flash flag as asked for, or False where its flash path cannot run here, with its complaint."""
        if not self.settings.client_flash:
            return False, ""
        # On a small batch, whose memory does not show beside the training's.
        small = replace(self.settings, batch=1, length=min(16, self.settings.length))
        try:
            self._loss(build_model(small, True), Batches(small, self.padded)[0]).backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return False, f"flash=True fails here: {str(error).splitlines()[0]}"
        return True, ""

    def _choose_backend(self) -> tuple[str, Explanation]:
        """The backend to ask for, and how each one judges this model's calls."""
        settings = self.settings
        size = (settings.batch, settings.heads, settings.length, 2 * DIM_HEAD)  # real and imaginary parts side by side
        q = torch.empty(size, device=settings.device)
        mask = torch.ones(settings.batch, settings.length, dtype=torch.bool, device=q.device) if self.padded else None

        def explain(backend: str) -> Explanation:
            return flash_attend.explain(q, q, q, mask=mask, causal=True, backend=backend)

        if settings.keep_flash and not self.flash and settings.backend == "auto":
            return "math", explain("math")
        explanation = explain(settings.backend)
        # The kernels are shown on every GPU that they serve, where they are not yet the default too.
        serves = {verdict.backend: verdict.serves for verdict in explanation.verdicts}
        if settings.backend == "auto" and self._on_gpu and serves["triton"]:
            return "triton", explain("triton")
        if explanation.plan is None:
            raise SystemExit(str(explanation))
        return settings.backend, explanation

    def _measure_attention(self) -> dict[str, tuple[float, float, float]]:
        """The first layer's attention alone, on the last batch: how far own and ours are from float64.

        For the output and each gradient: the largest error of the client's Attend, by the worse of its paths that run
        here, of ours, and the rounding of the largest element.
        """
        from complex_valued_transformer.attend import Attend

        ours = held_attends(self.model)[0]
        caught: list[Any] = []
        watch = ours.register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
        with torch.no_grad():
            self._loss(self.model, self.batches[len(self.batches.starts) - 1])
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

        own = [errors(Attend(causal=True, flash=flash)) for flash in {False, self.flash}]
        floors = [EPS * y.abs().max().item() for y in exact]
        columns = zip(map(max, zip(*own, strict=True)), errors(ours), floors, strict=True)
        return dict(zip(("out", "dq", "dk", "dv"), columns, strict=True))


def _load_optimizer() -> None:
    """The first step of any optimizer imports a good part of torch, which is none of the first training step's time."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()


def _forget_peak() -> None:
    """Has the peak so far forgotten where the system can: training is measured, and not what came before it."""
    with suppress(OSError):  # no Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------------------------------------------
# An arm in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def _serve(connection: Any, kind: str, settings: Settings, padded: bool) -> None:
    os.dup2(2, 1)  # what the client prints must not come between the lines of the table
    warnings.filterwarnings("ignore", message=".*sdp_kernel.*")  # the client's flash path calls what torch deprecates
    torch.set_num_threads(1)  # two arms' threads compete even while one arm waits, and the model is small
    try:
        arm = Arm(kind, settings, padded)
        connection.send((True, None))
        while (request := connection.recv()) is not None:
            name, *arguments = request
            connection.send((True, getattr(arm, name)(*arguments)))
    except (Exception, SystemExit):
        connection.send((False, traceback.format_exc()))


class RemoteArm:
    """An `Arm` in another process."""

    def __init__(self, kind: str, settings: Settings, padded: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.kind = kind
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, kind, settings, padded), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def step(self, index: int) -> tuple[float, float]:
        """Trains on batch `index`; returns the loss and the seconds."""
        return self._ask("step", index)

    def finish(self) -> Summary:
        """Ends the process."""
        summary = self._ask("finish")
        self.connection.send(None)
        self.process.join()
        return summary

    def _ask(self, *request: Any) -> Any:
        if not self.ready:  # awaited here, so that all processes start at once
            self._receive()
            self.ready = True
        self.connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            worked, answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(f"the process of {self.kind} ended with exit code {self.process.exitcode}") from None
        if not worked:
            raise SystemExit(f"{self.kind} failed:\n{answer}")
        return answer


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One comparison: the losses and seconds of each arm, step by step, and their summaries."""

    title: str
    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]
    summaries: dict[str, Summary]

    @property
    def differences(self) -> list[float]:
        """How far ours is from own, step by step."""
        return [abs(x - y) for x, y in zip(self.losses["own"], self.losses["ours"], strict=True)]

    @property
    def bounds(self) -> list[float]:
        """How far it may be."""
        return [ROUNDINGS * EPS * abs(own) * 2 ** (step / DOUBLING) for step, own in enumerate(self.losses["own"])]

    def complaints(self) -> list[str]:
        """What is wrong; nothing if the two agree."""
        found = []
        for step, (apart, bound) in enumerate(zip(self.differences, self.bounds, strict=True), start=1):
            if not apart <= bound:  # NaN too
                found.append(f"{self.title}: the losses of step {step} differ by {apart:.1e}, allowed is {bound:.1e}")
                break
        for name, (own, ours, floor) in self.summaries["ours"].errors.items():
            if not ours <= 2 * own + floor:
                found.append(f"{self.title}: {name} is {ours:.1e} from float64, the client's own is {own:.1e}")
        return found


def compare(settings: Settings, make_arm: Callable[[str, Settings, bool], Trainer]) -> list[Section]:
    """Trains all arms, unpadded and padded, in step."""
    from tqdm import tqdm

    sections = []
    plan = [(False, settings.steps), (True, settings.padded_steps)]
    with tqdm(total=sum(steps for _, steps in plan), desc="starting", unit="step") as bar:
        for padded, steps in plan:
            if not steps:
                continue
            title = "with key padding" if padded else "no padding"
            bar.set_description(f"training, {title}")
            arms = {kind: make_arm(kind, settings, padded) for kind in ARMS}
            losses, seconds = {kind: [] for kind in ARMS}, {kind: [] for kind in ARMS}
            for step in range(steps):
                first = step % len(ARMS)  # every arm is first and second equally often
                for kind in ARMS[first:] + ARMS[:first]:
                    loss, spent = arms[kind].step(step)
                    losses[kind].append(loss)
                    seconds[kind].append(spent)
                bar.update()
                bar.set_postfix_str(f"loss {losses['own'][-1]:.4f} own, {losses['ours'][-1]:.4f} ours")
            sections.append(Section(title, losses, seconds, {kind: arm.finish() for kind, arm in arms.items()}))
    return sections


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def tabulate(section: Section) -> str:
    """The section as a table."""
    differences, bounds = section.differences, section.bounds
    steps = len(differences)
    shown = sorted({0, *(round(part * (steps - 1) / 6) for part in range(7))})
    rows = [("", "own Attend", "flash_attend", "difference", "allowed")]
    for step in shown:
        own, ours = (f"{section.losses[kind][step]:.6f}" for kind in ("own", "ours"))
        rows.append((f"loss, step {step + 1}", own, ours, f"{differences[step]:.1e}", f"{bounds[step]:.1e}"))
    worst = max(range(steps), key=differences.__getitem__)
    rows.append((f"largest, step {worst + 1}", "", "", f"{differences[worst]:.1e}", f"{bounds[worst]:.1e}"))
    for name, (own, ours, floor) in section.summaries["ours"].errors.items():
        rows.append((f"{name} against float64", f"{own:.1e}", f"{ours:.1e}", "", f"{2 * own + floor:.1e}"))
    later = {kind: spent[1:] or spent for kind, spent in section.seconds.items()}
    medians = [statistics.median(later[kind]) for kind in ("own", "ours")]
    rows.append(
        ("seconds a step", *(f"{median:.4f}" for median in medians), f"own/ours {medians[0] / medians[1]:.2f}", "")
    )
    rows.append(("first step", *(f"{section.seconds[kind][0]:.4f}" for kind in ("own", "ours")), "", ""))
    peaks = [section.summaries[kind].peak_bytes for kind in ("own", "ours")]
    rows.append(("peak memory, MB", *("n/a" if peak is None else f"{peak / 1e6:.1f}" for peak in peaks), "", ""))

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([section.title, "", *lines])


def draw(sections: Sequence[Section], path: Path) -> None:
    """Both loss curves of each section, and below them their difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sections), figsize=(6 * len(sections), 7), squeeze=False, sharex="col")
    for (upper, lower), section in zip(axes.T, sections, strict=True):
        steps = range(1, len(section.differences) + 1)
        upper.plot(steps, section.losses["own"], label="own Attend", linewidth=3, alpha=0.4)
        upper.plot(steps, section.losses["ours"], label="flash_attend", linestyle="--", color="black")
        upper.set(title=section.title, ylabel="loss (nats a byte)")
        upper.legend()
        lower.plot(steps, section.differences, label="|own - flash_attend|", color="black", marker=".")
        lower.plot(steps, section.bounds, label="allowed", color="tab:red", linestyle=":")
        lower.set_yscale("symlog", linthresh=1e-7)
        lower.set_ylim(bottom=0)
        lower.set(xlabel="step", ylabel="difference of the losses")
        lower.xaxis.get_major_locator().set_params(integer=True)
        lower.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def describe(settings: Settings, sections: Sequence[Section]) -> str:
    """Everything there is to say, ending in the verdict."""
    summaries = sections[0].summaries
    memory = "allocated on the GPU" if settings.device.startswith("cuda") else "growth of the process during training"
    device = settings.device if settings.device.startswith("cuda") else f"{settings.device}, one thread"
    lines = [
        "",
        f"complex-valued-transformer on {device}: dim {settings.dim}, depth {settings.depth}, "
        f"{settings.heads} heads of {DIM_HEAD} complex numbers, batch {settings.batch}, length {settings.length}",
        "",
        summaries["ours"].report,
    ]
    for section in sections:
        lines += ["", tabulate(section)]
        lines += ["", f"own Attend: {section.summaries['own'].attention}"]
        lines += [f"flash_attend {section.summaries['ours'].attention}"]
    lines += [
        "",
        "against float64: largest error of the attention alone, the client's by the worse of its two paths",
        f"seconds: median without the first step; peak memory: {memory}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number is needed, got {text!r}") from None
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
        return value

    return parse


def device_option(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"no device {text!r}: {str(error).splitlines()[0]}") from None
    if device.type not in SIZES:
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device")
    return text


def parse_arguments(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    """The settings, and where the plot goes."""
    parser = argparse.ArgumentParser(
        description="Trains complex-valued-transformer on the standard library's source, with its own Attend and ours.",
        epilog="Sizes default to what suits the device. "
        + "; ".join(f"{kind}: {size}" for kind, size in SIZES.items()),
    )
    parser.add_argument("--device", type=device_option, help="cpu, cuda or cuda:N; default cuda where there is one")
    parser.add_argument("--steps", type=at_least(1), help="training steps without padding")
    parser.add_argument("--padded-steps", type=at_least(0), help="training steps with key padding; 0 for none")
    parser.add_argument("--batch", type=at_least(1))
    parser.add_argument("--length", type=at_least(2), help="bytes in a window")
    parser.add_argument("--dim", type=at_least(1), help="complex numbers in a token's vector")
    parser.add_argument("--depth", type=at_least(1), help="layers")
    parser.add_argument("--heads", type=at_least(1))
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="ours; auto takes the kernels on any GPU that they serve, not only where they are the default",
    )
    parser.add_argument("--keep-flash", action="store_true", help="patch(keep_flash=True)")
    parser.add_argument("--no-client-flash", action="store_true", help="build the client's model with flash_attn=False")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo.png", help="where the plot goes (.png)")
    given = parser.parse_args(argv)
    if given.out.suffix != ".png":
        parser.error(f"--out must end in .png, got {given.out}")

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES[torch.device(device).type]
    sizes = {name: size if getattr(given, name) is None else getattr(given, name) for name, size in sizes.items()}
    return (
        Settings(
            **sizes,
            seed=given.seed,
            device=device,
            backend=given.backend,
            keep_flash=given.keep_flash,
            client_flash=not given.no_client_flash,
        ),
        given.out,
    )


def main(argv: Sequence[str] | None = None, make_arm: Callable[[str, Settings, bool], Trainer] = RemoteArm) -> int:
    """Runs the demo; 0 if both trainings agree, 1 if they do not."""
    settings, path = parse_arguments(argv)
    sections = compare(settings, make_arm)
    print(describe(settings, sections))
    draw(sections, path)
    print(f"plot: {path}")
    complaints = [complaint for section in sections for complaint in section.complaints()]
    for complaint in complaints:
        print(f"FAILED: {complaint}")
    if not complaints:
        print("the two trainings agree to float32's rounding")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
