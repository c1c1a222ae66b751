"""Tokens a second and memory of whole training steps, with each model's own `Attend` and with ours.

    python benchmarks/train_step.py                      both models, at sizes that suit the device
    python benchmarks/train_step.py --quick              fewer rounds, of the same sizes
    python benchmarks/train_step.py --model complex --complete-complex --length 4096

A step is forward, loss, backward and optimizer, on a batch padded on the right. The models are a small causal
transformer, whose attention is the client's `Attend` on real tensors, and the client, complex-valued-transformer,
itself. Every arm starts from the same weights and takes the same batch again and again; it is on the device already.

Behind right padding a causal model of which only the valid tokens count needs no mask. Who knows that may leave it out,
so an arm does: it is what the others have to be compared with.

No time is taken of an arm that is wrong: its first step gives the loss of every token and the gradient of every
parameter, and `judge` says how far they may be from the same model in float64. An arm that is given the mask is also
judged by a loss that counts the padding, for without it nothing would show that the mask is heeded. An arm that cannot
run is listed with its error.

b batch, h heads, n length, d head dim, v vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from tqdm import tqdm

import flash_attend
from cases import DTYPES
from demo import (
    DIM_HEAD,
    EPS,
    LEARNING_RATE,
    ROUNDINGS,
    Batches,
    Settings,
    at_least,
    build_model,
    device_option,
    held_attends,
)
from measure import (
    Stopwatch,
    clocks,
    environment,
    first_line,
    interleave,
    numerics,
    peak_bytes,
    rounded,
    stopwatch_for,
    summarise,
)
from results import results_folder, write_results
from verdicts import one_line

__all__ = ["Arm", "Batch", "Check", "Row", "Workload", "arms_for", "judge", "main", "measure_workload"]

VOCABULARY = 256  # bytes
IGNORED = -100  # the label of a padded token
SMALLEST = 64  # numbers whose error together is no matter of luck
OURS = "flash_attend"

# float16 would need a gradient scaler; complex numbers have no bfloat16.
MODEL_DTYPES = {"padded": ("bfloat16", "float32", "tf32"), "complex": ("float32", "tf32")}

# What a CPU with two cores does in some seconds, and what gives a GPU something to do and still leaves room for the
# einsum path's scores.
SIZES = {
    ("cpu", "padded"): dict(dim=128, depth=2, heads=4, length=256, batch=4, dtype="float32"),
    ("cpu", "complex"): dict(dim=64, depth=2, heads=4, length=192, batch=4, dtype="float32"),
    ("cuda", "padded"): dict(dim=512, depth=6, heads=8, length=2048, batch=8, dtype="bfloat16"),
    ("cuda", "complex"): dict(dim=256, depth=4, heads=8, length=2048, batch=4, dtype="float32"),
}


@dataclass(frozen=True)
class Plan:
    """How often, and how long."""

    preset: str
    rounds: int
    milliseconds: float  # of one arm in one round, at most about


PLANS = {plan.preset: plan for plan in (Plan("quick", 3, 200.0), Plan("standard", 5, 500.0))}


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One model, its precision and the size of its batch."""

    model: str
    dim: int
    depth: int
    heads: int
    length: int
    batch: int
    dtype: str  # a key of `cases.DTYPES`
    complete_complex: bool
    device: str
    seed: int

    @property
    def name(self) -> str:
        """Says all that decides the work."""
        model = {"padded": "padded transformer", "complex": "complex-valued-transformer"}[self.model]
        words = [model, "complete complex"] if self.complete_complex else [model]
        head = f"h{self.heads} d{DIM_HEAD if self.model == 'complex' else self.dim // self.heads}"
        return " ".join([*words, self.dtype, f"dim{self.dim} depth{self.depth} {head} b{self.batch} n{self.length}"])

    @property
    def shape(self) -> tuple[int, ...]:
        """`(b, h, hk, i, j, d, dv)` of one call of its Attend."""
        if self.model == "padded":
            batch, dim, value_dim = self.batch, self.dim // self.heads, self.dim // self.heads
        elif self.complete_complex:  # a call for each choice of real and imaginary parts, and v holds both
            batch, dim, value_dim = 4 * self.batch, DIM_HEAD, 2 * DIM_HEAD
        else:
            batch, dim, value_dim = self.batch, 2 * DIM_HEAD, 2 * DIM_HEAD
        return batch, self.heads, self.heads, self.length, self.length, dim, value_dim

    @property
    def settings(self) -> Settings:
        """What the demo calls it."""
        return Settings(
            steps=0,
            padded_steps=1,
            batch=self.batch,
            length=self.length,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            seed=self.seed,
            device=self.device,
            backend="auto",
            keep_flash=False,
            client_flash=True,
        )


class Attention(nn.Module):
    """Self-attention around an `Attend` that it is given."""

    def __init__(self, dim: int, heads: int, attend: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # Apart, so that dq, dk and dv each have gradients of their own to be seen in.
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.split_heads = Rearrange("b n (h d) -> b h n d", h=heads)
        self.merge_heads = Rearrange("b h n d -> b n (h d)")
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.attend = attend

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm(x)
        q, k, v = (self.split_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.merge_heads(self.attend(q, k, v, mask=mask)))


def feed_forward(dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class PaddedTransformer(nn.Module):
    """A causal language model, pre-norm, on bytes: `(b, n)` and a key mask `(b, 1, 1, n)` to logits `(b, n, v)`."""

    def __init__(self, *, dim: int, depth: int, heads: int, length: int, make_attend: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(torch.randn(length, dim))
        layers = ([Attention(dim, heads, make_attend()), feed_forward(dim)] for _ in range(depth))
        self.layers = nn.ModuleList(map(nn.ModuleList, layers))
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x = self.embed(tokens) + self.positions
        for attend, feed in self.layers:
            x = x + attend(x, mask)
            x = x + feed(x)
        return self.to_logits(self.norm(x))


class RealLogits(nn.Module):
    """The client's model, called as `PaddedTransformer` is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.net(tokens, mask=mask, return_real_logits=True)


def build(workload: Workload, flash: bool) -> nn.Module:
    """The model with its own Attend, in float32 and with the same weights for every arm."""
    from complex_valued_transformer import ComplexMultiheadAttention, complex_attention_complete
    from complex_valued_transformer.attend import Attend

    if workload.model == "padded":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(workload.seed)
            model = PaddedTransformer(
                dim=workload.dim,
                depth=workload.depth,
                heads=workload.heads,
                length=workload.length,
                make_attend=partial(Attend, causal=True, flash=flash),
            )
        return model.to(workload.device)
    model = RealLogits(build_model(workload.settings, flash).net)
    if workload.complete_complex:
        for layer in model.modules():
            if isinstance(layer, ComplexMultiheadAttention):
                layer.attend = partial(complex_attention_complete, **layer.attend.keywords)
    return model


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Turns a model's numbers, real and complex, into double precision, and lets the client take them."""
    from complex_valued_transformer import complex_valued_transformer as client

    for held in (*model.parameters(), *model.buffers()):
        held.data = held.data.to(torch.promote_types(held.dtype, torch.float64))
    # Its attention asserts that it gets what it knows as `cfloat`.
    with mock.patch.object(client, "cfloat", torch.complex128):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A way to attend in a model."""

    name: str
    flash: bool  # of the model's own Attend
    prepare: Callable[[nn.Module], object] = lambda model: None  # what is done to the model then
    masked: bool = True  # whether the model is given the mask


OWN_EINSUM = Arm("own einsum", flash=False)  # by whose error the others are judged


def allow_every_kernel(model: nn.Module) -> None:
    """Lets the client's flash path choose among PyTorch's kernels, of which it allows one alone on A100 and H100."""
    from complex_valued_transformer.attend import Attend

    for attend in (*(module for module in model.modules() if isinstance(module, Attend)), *held_attends(model)):
        attend.cuda_config = attend.cpu_config  # which allows all of them


def arms_for(device: torch.device) -> list[Arm]:
    """The arms of a device. Our backend is asked for by name."""
    if device.type == "cpu":  # whose kernels the client allows anyhow
        flash = [Arm("own flash", True), Arm("own flash, no mask", True, masked=False)]
        ours = Arm(f"{OURS} math", False, partial(flash_attend.patch, backend="math", strict=True))
    else:
        flash = [
            Arm("own flash", True),
            Arm("own flash, any kernel", True, allow_every_kernel),
            Arm("own flash, any kernel, no mask", True, allow_every_kernel, masked=False),
        ]
        ours = Arm(OURS, False, partial(flash_attend.patch, backend="triton", strict=True))
    return [OWN_EINSUM, *flash, ours]


@dataclass(frozen=True)
class Batch:
    """Bytes padded on the right, of lengths from a quarter of n to n. The last byte of each is followed by the padding.

    The labels of the padding are IGNORED, except where it counts.
    """

    tokens: Tensor  # (b, n)
    labels: Tensor  # (b, n)
    mask: Tensor | None  # bool (b, 1, 1, n), True = a valid token
    valid: int  # how many tokens of the whole batch are no padding

    @staticmethod
    def of(workload: Workload, masked: bool = True) -> Batch:
        """The batch of a workload, and of all its arms."""
        window, mask = (x.to(workload.device) for x in Batches(workload.settings, padded=True)[0])
        labels = window[:, 1:].masked_fill(~mask[:, 0, 0], IGNORED)
        return Batch(window[:, :-1], labels, mask if masked else None, int(mask.sum()))

    def counting_padding(self) -> Batch:
        """The same batch with a loss of which the padding, labelled with itself, is a part."""
        return replace(self, labels=self.labels.masked_fill(self.labels == IGNORED, 0))

    def sequences(self) -> list[Batch]:
        """Its sequences, each as a batch, whose losses add up to the whole one's."""
        one_by_one = (slice(index, index + 1) for index in range(len(self.tokens)))
        return [
            replace(self, tokens=self.tokens[one], labels=self.labels[one], mask=self.mask[one]) for one in one_by_one
        ]


def token_losses(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    """The losses `(b, n)` of the tokens, 0 where a label is IGNORED."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(batch.tokens, mask=batch.mask)
        logits = rearrange(logits, "b n v -> b v n")
        return F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=IGNORED)


class Training:
    """One arm at work."""

    def __init__(self, workload: Workload, arm: Arm) -> None:
        self.dtype = workload.dtype
        self.batch = Batch.of(workload, arm.masked)
        self.model = build(workload, arm.flash)
        arm.prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def loss(self) -> Tensor:
        """The mean over the valid tokens."""
        return token_losses(self.model, self.batch, self.dtype).sum() / self.batch.valid

    def step(self) -> None:
        """Forward, loss, backward, optimizer."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def resting_bytes(self) -> int:
        """What lies there between two steps, the batch aside: the weights and the optimizer's state."""
        states = (x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        return sum(x.nbytes for x in (*self.model.parameters(), *self.model.buffers(), *states))


# ---------------------------------------------------------------------------------------------------------------------
# Right first
# ---------------------------------------------------------------------------------------------------------------------

Answers = dict[str, Tensor]  # float64 `(m,)`, by name


def first_step(model: nn.Module, batches: Sequence[Batch], dtype: str) -> Answers:
    """The losses of the tokens and the gradients, summed over `batches`, which together are one.

    The gradients of a parameter and of its namesakes in other layers are one answer, and all gradients another one;
    few numbers alone (a layer's scalar) are in the latter only.
    """
    losses = []
    for batch in batches:
        loss = token_losses(model, batch, dtype)
        (loss.sum() / batch.valid).backward()
        losses.append(loss.detach().double().flatten())
    gradients = defaultdict(list)
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        gradients[f"gradient of {re.sub('[0-9]+', '*', name)}"].append(gradient.double().flatten())
    model.zero_grad()
    joined = {name: torch.cat(parts) for name, parts in gradients.items()}
    return {
        "loss of the tokens": torch.cat(losses),
        "gradient of everything": torch.cat(list(joined.values())),
        **{name: gradient for name, gradient in joined.items() if len(gradient) >= SMALLEST},
    }


def all_answers(model: nn.Module, batches: Sequence[Batch], dtype: str) -> Answers:
    """What is judged: the first step, and for a model that is given the mask one of which the padding is a part."""
    answers = first_step(model, batches, dtype)
    if batches[0].mask is None:
        return answers
    counted = first_step(model, [batch.counting_padding() for batch in batches], dtype)
    return answers | {f"{name} with the padding counted": answer for name, answer in counted.items()}


def distances(answers: Answers, exact: Answers) -> dict[str, float]:
    """How far each answer is from the exact one, in the 2-norm and relative to it."""
    return {name: _distance(answer, exact[name]) for name, answer in answers.items()}


def _distance(answer: Tensor, exact: Tensor) -> float:
    smallest = torch.finfo(exact.dtype).tiny  # a gradient may be 0: of queries that see one key
    return ((answer - exact).norm() / exact.norm().clamp(min=smallest)).item()


@dataclass(frozen=True)
class Check:
    """What became of an arm's first step."""

    rel_error: float | None = None  # the largest of the answers', in the 2-norm; None where one is not a number
    budget_used: float | None = None  # the largest share of the budget
    error: str = ""  # empty where the answers are right


def judge(errors: dict[str, float], einsum: dict[str, float], dtype: str) -> Check:
    """Judges the errors of an arm, as `distances` gives them, by those of the own einsum path.

    Allowed is twice those. Beside it, for what is luck in them: one rounding to the dtype (eps / 2), and as many of
    float32's as the demo allows a loss, for the client's ModReLU amplifies single ones. Measured on a CPU in 90 first
    steps of the client in float32 (own flash, own einsum nudged by half a rounding, ours): up to 0.74 of that is used,
    and without the latter 1.47 would be. A scale that is wrong by a tenth uses ten thousand times that.
    """
    eps = torch.finfo(torch.float16 if dtype == "tf32" else DTYPES[dtype][0]).eps  # TF32 has float16's mantissa
    budgets = {name: 2 * einsum[name] + eps / 2 + ROUNDINGS * EPS for name in errors}
    for name, error in errors.items():
        if not math.isfinite(error):
            return Check(error=f"wrong: the {name} has NaN or infinity")
    worst = max(errors, key=lambda name: errors[name] / budgets[name])
    check = Check(max(errors.values()), errors[worst] / budgets[worst])
    if check.budget_used <= 1:
        return check
    return replace(
        check, error=f"wrong: the {worst} is {errors[worst]:.1e} from float64, allowed is {budgets[worst]:.1e}"
    )


class Gate:
    """Float64, and the own einsum path's distance from it, on the weights and the batch of a workload."""

    def __init__(self, workload: Workload) -> None:
        self.dtype = workload.dtype
        batch = Batch.of(workload)
        model = build(workload, OWN_EINSUM.flash)
        with in_float64(model):
            self.exact = all_answers(model, batch.sequences(), "float64")
        try:
            self.einsum = self._errors(build(workload, OWN_EINSUM.flash), [batch])
            self.measure = "on the whole batch"
        except torch.OutOfMemoryError:
            self.measure = "a sequence at a time"
        if self.measure != "on the whole batch":  # not in the handler, which holds what did not fit
            self.einsum = self._errors(build(workload, OWN_EINSUM.flash), batch.sequences())

    @property
    def checked(self) -> str:
        """What is checked."""
        return f"losses and gradients of the first step; the own einsum path's error {self.measure}"

    def _errors(self, model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
        return distances(all_answers(model, batches, self.dtype), self.exact)

    def check(self, training: Training) -> Check:
        """Judges an arm before its first step, which it leaves undone."""
        return judge(self._errors(training.model, [training.batch]), self.einsum, self.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One arm of one workload. Times are in milliseconds of one step; None where it was not measured."""

    case: str
    pass_: str  # "pass" in the file
    dtype: str
    mask: str
    shape: tuple[int, ...]  # of a call of Attend: (b, h, hk, i, j, d, dv)
    peer: str
    valid_tokens: int  # in a batch
    tokens: int  # padding included
    ms_median: float | None = None
    ms_iqr: float | None = None
    ms_rounds: tuple[float, ...] = ()  # the median of each round
    valid_tokens_per_s: float | None = None
    tokens_per_s: float | None = None  # padding included
    rel_error: float | None = None
    budget_used: float | None = None  # above 1 is wrong
    checked: str = ""
    peak_bytes: int | None = None  # of a step, weights and optimizer state included
    error: str = ""  # why there is no time: what the arm raised, or "wrong: ..."
    samples: tuple[tuple[float, ...], ...] = ()  # by round

    @property
    def is_ours(self) -> bool:
        """Whether it is flash_attend's."""
        return self.peer.startswith(OURS)

    def as_json(self) -> dict[str, Any]:
        """The row under the names of the file."""
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


class ShownStopwatch:
    """A stopwatch that moves a progress bar."""

    def __init__(self, stopwatch: Stopwatch, bar: tqdm) -> None:
        self.stopwatch, self.bar = stopwatch, bar

    def sample(self, function: Callable[[], object], milliseconds: float) -> list[float]:
        """As the stopwatch's."""
        samples = self.stopwatch.sample(function, milliseconds)
        self.bar.update()
        return samples


def count_samples(arms: Sequence[Arm], plan: Plan) -> int:
    """How far `measure_workload` moves its progress bar."""
    return 1 + len(arms) * (plan.rounds + 2)  # the gate; a check, and `interleave` takes a sample before its rounds


def measure_workload(workload: Workload, arms: Sequence[Arm], plan: Plan, stopwatch: Stopwatch, bar: tqdm) -> list[Row]:
    """A row of every arm: right first, then timed in turn."""
    valid, tokens = Batch.of(workload).valid, workload.batch * workload.length
    common = dict(
        case=workload.name,
        pass_="training step",
        dtype=workload.dtype,
        mask=f"right{100 * valid / tokens:.0f} causal",
        shape=workload.shape,
        valid_tokens=valid,
        tokens=tokens,
    )
    rows = {arm.name: Row(**common, peer=arm.name) for arm in arms}
    trainings = {}
    with numerics(workload.dtype), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*sdp_kernel.*")  # which the client's flash path calls
        bar.set_description(f"{workload.model}: float64")
        try:
            gate = Gate(workload)
        except torch.OutOfMemoryError as error:
            bar.total -= count_samples(arms, plan)
            return [replace(row, error=f"not checked: {first_line(error)}") for row in rows.values()]
        bar.update()
        for arm in arms:
            bar.set_description(f"{workload.model}: checking {arm.name}")
            try:
                training, rows[arm.name] = _admit(workload, arm, gate, rows[arm.name])
            except Exception as error:  # whatever stops an arm is what its row says
                rows[arm.name] = replace(rows[arm.name], error=first_line(error))
            if rows[arm.name].error:
                bar.total -= plan.rounds + 1
            else:
                trainings[arm.name] = training
            bar.update()

        bar.set_description(f"{workload.model}: training")
        functions = {name: training.step for name, training in trainings.items()}
        shown = ShownStopwatch(stopwatch, bar)
        try:
            samples = interleave(functions, shown, rounds=plan.rounds, milliseconds=plan.milliseconds)
        except torch.OutOfMemoryError as error:  # each of them ran alone
            return [
                row if row.error else replace(row, error=f"beside the others: {first_line(error)}")
                for row in rows.values()
            ]
        for name, training in trainings.items():
            if not training.loss().isfinite():  # numbers that are none may take another time
                rows[name] = replace(rows[name], error="wrong: the loss is not finite after the training")
            else:
                rows[name] = _timed(rows[name], samples[name])
    return list(rows.values())


def _admit(workload: Workload, arm: Arm, gate: Gate, row: Row) -> tuple[Training, Row]:
    """An arm that is ready to be timed, unless its row has an error."""
    training = Training(workload, arm)
    check = gate.check(training)
    row = replace(row, checked=gate.checked, **asdict(check))
    if not row.error:
        training.step()  # the first one makes the optimizer's state
        peak = peak_bytes(training.step, torch.device(workload.device))
        row = replace(row, peak_bytes=None if peak is None else peak + training.resting_bytes())
    return training, row


def _timed(row: Row, samples: list[list[float]]) -> Row:
    found = summarise(samples)
    return replace(
        row,
        ms_median=rounded(found.median),
        ms_iqr=rounded(found.iqr),
        ms_rounds=tuple(map(rounded, found.rounds)),
        valid_tokens_per_s=rounded(1e3 * row.valid_tokens / found.median),
        tokens_per_s=rounded(1e3 * row.tokens / found.median),
        samples=tuple(tuple(map(rounded, part)) for part in samples),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def tabulate(rows: Sequence[Row]) -> str:
    """The rows of one workload as a table."""
    first = rows[0]
    einsum = next((row.ms_median for row in rows if row.peer == OWN_EINSUM.name), None)
    table = [("", "ms a step", "+-", "valid tokens/s", "with padding", "peak MB", "speed-up", "budget used")]
    for row in rows:
        if row.error:
            continue
        table.append(
            (
                row.peer,
                f"{row.ms_median:.4g}",
                f"{row.ms_iqr / 2:.2g}",
                f"{row.valid_tokens_per_s:,.0f}",
                f"{row.tokens_per_s:,.0f}",
                "n/a" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
                "n/a" if einsum is None else f"{einsum / row.ms_median:.2f}",
                f"{row.budget_used:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in table]
    lines.insert(1, "-" * len(lines[0]))
    lines += [f"{row.peer}: {row.error}" for row in rows if row.error]
    return "\n".join([first.case, f"{first.valid_tokens} of {first.tokens} tokens are valid", "", *lines])


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of tokens a second, and of memory where it was measured, by workload and arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = defaultdict(list)
    for row in rows:
        workloads[row.case].append(row)
    columns = 2 if any(row.peak_bytes is not None for row in rows) else 1
    heights = [1.2 + 0.35 * len(arms) for arms in workloads.values()]
    figure, axes = pyplot.subplots(
        len(workloads),
        columns,
        figsize=(5 + 4 * columns, sum(heights) + 0.5),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    figure.suptitle(title, fontsize="medium")
    for line, (case, arms) in zip(axes, workloads.items(), strict=True):
        line[0].set_title(case, loc="left", fontsize="small")
        rates = [row.valid_tokens_per_s or 0 for row in arms]
        spreads = [
            rate * row.ms_iqr / 2 / row.ms_median if row.ms_median else 0 for rate, row in zip(rates, arms, strict=True)
        ]
        _draw_bars(line[0], arms, rates, "valid tokens a second", spreads)
        if columns == 2:
            peaks = [0 if row.error else (row.peak_bytes or 0) / 1e6 for row in arms]
            _draw_bars(line[1], arms, peaks, "peak memory of a step, MB")
            line[1].set_yticklabels([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_bars(
    axis: Any, rows: Sequence[Row], values: Sequence[float], label: str, spreads: Sequence[float] | None = None
) -> None:
    """Bars with their numbers; an arm that has none shows why."""
    names = [row.peer for row in rows]
    colours = ["#0072B2" if row.is_ours else "#B0B0B0" for row in rows]
    bars = axis.barh(names, values, xerr=spreads, color=colours, error_kw=dict(ecolor="#404040", capsize=2))
    told = [one_line(row.error, 48) if row.error else f"{value:,.0f}" for row, value in zip(rows, values, strict=True)]
    axis.bar_label(bars, told, padding=3, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.margins(x=0.2)
    axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> tuple[list[Workload], Plan, Path | None]:
    """The workloads, how long they are measured, and where the results go if not to the device's folder."""
    parser = argparse.ArgumentParser(
        description="Measures training steps with a model's own Attend and with flash_attend.",
        epilog="Sizes default to what suits the device and the model. "
        + "; ".join(f"{' '.join(kind)}: {size}" for kind, size in SIZES.items()),
    )
    parser.add_argument("--device", type=device_option, help="cpu, cuda or cuda:N; default cuda where there is one")
    parser.add_argument("--model", choices=(*MODEL_DTYPES, "both"), default="both")
    parser.add_argument("--complete-complex", action="store_true", help="the client's complete complex attention")
    parser.add_argument(
        "--dtype", choices=MODEL_DTYPES["padded"], help="bfloat16 by autocast, of the padded model only"
    )
    parser.add_argument("--dim", type=at_least(1), help="(complex) numbers in a token's vector")
    parser.add_argument("--depth", type=at_least(1), help="layers")
    parser.add_argument("--heads", type=at_least(1))
    parser.add_argument("--length", type=at_least(2), help="tokens of a sequence, padding included")
    parser.add_argument("--batch", type=at_least(1))
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--rounds", type=at_least(1), help="; ".join(f"{p.preset}: {p.rounds}" for p in PLANS.values()))
    parser.add_argument("--out", type=Path, help="where the results go (.json), and beside them the plot")
    given = parser.parse_args(argv)
    if given.out is not None and given.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {given.out}")
    if given.complete_complex and given.model == "padded":
        parser.error("--complete-complex is an option of the complex model, got --model padded")
    if importlib.util.find_spec("complex_valued_transformer") is None:
        parser.error("complex-valued-transformer, whose Attend is measured, is not installed; the extra bench has it")

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workloads = []
    for model in MODEL_DTYPES if given.model == "both" else (given.model,):
        sizes = SIZES[torch.device(device).type, model]
        sizes = {name: size if getattr(given, name) is None else getattr(given, name) for name, size in sizes.items()}
        if sizes["dtype"] not in MODEL_DTYPES[model]:
            parser.error(f"--dtype {sizes['dtype']} is not for complex numbers: add --model padded")
        if model == "padded" and sizes["dim"] % sizes["heads"]:
            parser.error(f"--dim must be a multiple of --heads, got {sizes['dim']} and {sizes['heads']}")
        complete = given.complete_complex and model == "complex"
        workloads.append(Workload(model=model, complete_complex=complete, device=device, seed=given.seed, **sizes))
    plan = PLANS["quick" if given.quick else "standard"]
    return workloads, replace(plan, rounds=given.rounds or plan.rounds), given.out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if an arm of ours is wrong or cannot run."""
    workloads, plan, path = parse_arguments(argv)
    device = torch.device(workloads[0].device)
    if device.type == "cpu":
        print("on a CPU, where flash_attend is its einsum path: this says nothing about a GPU; memory is not counted")
    header = environment(device) | {"preset": plan.preset, "clocks_before": clocks(device)}
    path = path or results_folder(header["device"]) / "train-step.json"
    arms, stopwatch = arms_for(device), stopwatch_for(device)
    rows: list[Row] = []
    with tqdm(total=len(workloads) * count_samples(arms, plan), unit="sample") as bar:
        for workload in workloads:
            measured = measure_workload(workload, arms, plan, stopwatch, bar)
            rows += measured
            bar.write(f"\n{tabulate(measured)}\n")
            header |= {
                "clocks_after": clocks(device),
                "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            write_results(path, header, "rows", (row.as_json() for row in rows))
    print(
        f"median of {plan.rounds} rounds, interleaved, +- half the range between the quartiles; peak: of a whole step"
    )
    print(f"speed-up: over {OWN_EINSUM.name}; no mask: right where padding is on the right and does not count")
    plot = path.with_suffix(".png")
    draw(rows, f"Training steps on {header['device']}, torch {header['torch']}, {header['started'][:10]}", plot)
    print(f"results: {path}\nplot: {plot}")
    return int(any(row.error for row in rows if row.is_ours))


if __name__ == "__main__":
    sys.exit(main())
