"""Whole training steps as cases of the benchmark: with each model's own `Attend` and with ours.

A step is forward, loss, backward and optimizer, on a batch padded on the right. The models are a causal decoder of
x-transformers, and complex-valued-transformer in both of its forms. Every arm starts from the same weights and takes
the same batch again and again; it is on the device already. The learning rate is 0: the optimizer does its work, and
every step that is timed is the one that was judged.

Behind right padding a causal model of which only the valid tokens count needs no mask. Who knows that may leave it out,
so an arm does: it is what the others have to be compared with.

Right first, as for a call: the step gives the loss of every token and the gradient of every parameter, and `judge` says
how far they may be from the same model in float64. An arm that is given the mask is also judged by a loss that counts
the padding, for without it nothing would show that the complex models heed the mask. (x-transformers clears what padded
queries give.)

b batch, h heads, n length, d head dim, v vocabulary.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import flash_attend
from cases import DTYPES, Case, make_mask
from gate import Check
from peers import GPU, Peer, Unserved

__all__ = ["ARMS", "Training", "Workload", "judge", "workloads"]

STEP = "training step"
VOCABULARY = 256
IGNORED = -100  # the label of a padded token
SMALLEST = 64  # numbers whose error together is no matter of luck
DIM_HEAD = 32  # complex numbers of a head of the client
EPS = torch.finfo(torch.float32).eps
# So many float32 roundings are allowed beside twice the own einsum path's error, for the client's ModReLU, which takes
# the angle of numbers near zero, amplifies single ones. Measured on a CPU in 90 first steps of the client in float32:
# up to 0.74 of that is used, and without these 1.47 would be; in the step that a CPU measures 0.96, by the own flash
# path as by ours. A scale that is wrong by a tenth uses ten thousand times that.
ROUNDINGS = 64
REAL, COMPLEX, COMPLETE = "x-transformers", "complex-valued-transformer", "complete complex"


@dataclass(frozen=True, kw_only=True)
class Workload(Case):
    """One model, its precision and the size of its batch; as a case, the calls of its attention."""

    model: str
    dim: int
    depth: int
    sequences: int  # of a batch

    @property
    def name(self) -> str:
        """Says all that decides the work."""
        head = f"h{self.heads} d{self.head_dim if self.model == REAL else DIM_HEAD}"
        sizes = f"dim{self.dim} depth{self.depth} {head} b{self.sequences} n{self.queries}"
        return f"{self.model} {self.dtype} {sizes}"


def workload(model: str, dtype: str, dim: int, depth: int, heads: int, length: int, batch: int) -> Workload:
    """A model that is trained on batches of so many sequences, in a precision of `cases.DTYPES`."""
    calls, head_dim, value_dim = {
        REAL: (batch, dim // heads, dim // heads),
        COMPLEX: (batch, 2 * DIM_HEAD, 2 * DIM_HEAD),
        COMPLETE: (4 * batch, DIM_HEAD, 2 * DIM_HEAD),
    }[model]
    mask = dict(causal=True, mask="right", valid=0.625)
    told = dict(passes=(STEP,), group="training steps", core=True)
    of_model = dict(model=model, dim=dim, depth=depth, sequences=batch)
    return Workload(calls, heads, length, length, head_dim, value_dim, heads, dtype, **mask, **told, **of_model)


# The precision beside bfloat16, and dim, depth, heads, length and batch of real and of complex models, which have no
# bfloat16: what a CPU with two cores does in some seconds, and what gives a GPU something to do and still leaves room
# for the einsum path's scores.
SIZES = {
    "cpu": ("float32", (128, 2, 4, 256, 4), (64, 2, 4, 192, 4)),
    "cuda": ("tf32", (512, 6, 8, 2048, 8), (256, 4, 8, 2048, 4)),
}


def workloads(device: str) -> list[Workload]:
    """Those for "cpu" or "cuda"."""
    single, real, complex_ = SIZES[device]
    made = [workload(REAL, dtype, *real) for dtype in ("bfloat16", single)]
    return made + [workload(model, "float32", *complex_) for model in (COMPLEX, COMPLETE)]


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def build(workload: Workload, device: torch.device, flash: bool = False) -> nn.Module:
    """The model with its own Attend, in float32 and with the same weights for every arm.

    It takes tokens `(b, n)` and a mask `(b, 1, 1, n)` or None, and gives logits `(b, n, v)`.
    """
    from complex_valued_transformer import ComplexTransformer
    from x_transformers import Decoder, TransformerWrapper

    sizes = dict(dim=workload.dim, depth=workload.depth, heads=workload.heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if workload.model == REAL:
            layers = Decoder(**sizes, attn_dim_head=workload.head_dim, attn_flash=flash)
            model = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=workload.queries, attn_layers=layers)
            model.register_forward_pre_hook(_with_mask_of_two_dims, with_kwargs=True)
            return model.to(device)
        form = dict(causal=True, flash_attn=flash, complete_complex=workload.model == COMPLETE)
        model = ComplexTransformer(num_tokens=VOCABULARY, dim_head=DIM_HEAD, **sizes, **form)
    # Its RMS norm gives vectors of RMS gamma / dim: with a gamma of 1 the attention would have next to no weight.
    for norm in (model.norm, *(layer[0] for layer in model.layers)):
        nn.init.constant_(norm.gamma, workload.dim)
    model.forward = partial(model.forward, return_real_logits=True)
    return model.to(device)


def _with_mask_of_two_dims(model: nn.Module, tokens: tuple[Tensor], options: dict) -> tuple[tuple[Tensor], dict]:
    mask = options["mask"]
    return tokens, {"mask": mask if mask is None else mask[:, 0, 0]}


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


def allow_every_kernel(model: nn.Module) -> None:
    """Lets the complex models' flash path choose among PyTorch's kernels, of which it allows one on A100 and H100."""
    from complex_valued_transformer import ComplexMultiheadAttention

    layers = [module for module in model.modules() if isinstance(module, ComplexMultiheadAttention)]
    if not layers:
        raise Unserved("may choose by itself")
    for layer in layers:
        attend = layer.attend.keywords["attend"]
        attend.cuda_config = attend.cpu_config  # which allows all of them


class Arm(NamedTuple):
    """A way to attend in a model: prepares a model, which it is given with or without the client's flash path."""

    flash: bool = False
    change: Callable[[nn.Module], object] = lambda model: None
    masked: bool = True  # whether the model is given the mask

    def __call__(self, workload: Workload, device: torch.device) -> nn.Module:
        model = build(workload, device, self.flash)
        self.change(model)
        return model


ARMS = (
    Peer("flash_attend", "the model, patched", Arm(change=partial(flash_attend.patch, strict=True)), ours=True),
    Peer("own einsum", "the model's own Attend, by whose error the others are judged", Arm()),
    Peer("own flash", "the model's own Attend, flash=True", Arm(flash=True)),
    Peer("own flash, no mask", "the same, without the mask", Arm(flash=True, masked=False)),
    Peer("own flash, any kernel", "the same, by any of PyTorch's kernels", Arm(True, allow_every_kernel), GPU),
    Peer("own flash, any kernel, no mask", "both", Arm(True, allow_every_kernel, masked=False), GPU),
)


class Batch(NamedTuple):
    """Random tokens padded on the right. The labels of the padding are IGNORED, except where it counts."""

    tokens: Tensor  # (b, n)
    labels: Tensor  # (b, n)
    mask: Tensor | None  # bool (b, 1, 1, n), True = a valid token
    valid: int  # how many tokens of the whole batch are no padding

    @staticmethod
    def of(workload: Workload, device: torch.device) -> Batch:
        """The batch of a workload, and of all its arms."""
        generator = torch.Generator().manual_seed(0)
        mask = make_mask(replace(workload, batch=workload.sequences), torch.device("cpu"), generator)
        window = torch.randint(VOCABULARY, (workload.sequences, workload.queries + 1), generator=generator)
        tokens, labels = window[:, :-1].masked_fill(~mask, 0), window[:, 1:].masked_fill(~mask, IGNORED)
        return Batch(*(x.to(device) for x in (tokens, labels, mask[:, None, None, :])), int(mask.sum()))

    def counting_padding(self) -> Batch:
        """The same batch with a loss of which the padding, labelled with itself, is a part."""
        return self._replace(labels=self.labels.masked_fill(self.labels == IGNORED, 0))

    def sequences(self) -> list[Batch]:
        """Its sequences, each as a batch, whose losses add up to the whole one's."""
        return [Batch(*part, self.valid) for part in zip(*(x.split(1) for x in self[:3]), strict=True)]


def token_losses(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    """The losses `(b, n)` of the tokens, 0 where a label is IGNORED; added up they are the mean over the valid ones."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = rearrange(model(batch.tokens, mask=batch.mask), "b n v -> b v n")
        return F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=IGNORED) / batch.valid


# ---------------------------------------------------------------------------------------------------------------------
# Right first
# ---------------------------------------------------------------------------------------------------------------------

Answers = dict[str, Tensor]  # float64 `(m,)`, by name


def answers_of(model: nn.Module, batches: list[Batch], dtype: str) -> Answers:
    """The losses of the tokens and the gradients, summed over `batches`, which together are one; of a model that is
    given the mask also those of a step of which the padding is a part.

    The gradients of a parameter and of its namesakes in other layers are one answer, and all gradients another one;
    few numbers alone (a layer's scalar) are in the latter only.
    """
    steps = {"": batches}
    if batches[0].mask is not None:
        steps[" with the padding counted"] = [batch.counting_padding() for batch in batches]
    found = defaultdict(list)
    for what, parts in steps.items():
        for batch in parts:
            losses = token_losses(model, batch, dtype)
            losses.sum().backward()
            found[f"loss of the tokens{what}"].append(losses.detach())
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            for whose in ("everything", re.sub("[0-9]+", "*", name)):
                found[f"gradient of {whose}{what}"].append(gradient)
        model.zero_grad()
    joined = {name: torch.cat([part.double().flatten() for part in parts]) for name, parts in found.items()}
    return {name: answer for name, answer in joined.items() if len(answer) >= SMALLEST}


def distances(answers: Answers, exact: Answers) -> dict[str, float]:
    """How far each answer is from the exact one, in the 2-norm and relative to it."""
    tiny = torch.finfo(torch.float64).tiny  # a gradient may be 0: of queries that see one key
    return {
        name: ((answer - exact[name]).norm() / exact[name].norm().clamp(min=tiny)).item()
        for name, answer in answers.items()
    }


def judge(errors: dict[str, float], einsum: dict[str, float], dtype: str) -> Check:
    """Judges the errors of an arm, as `distances` gives them, by twice those of the own einsum path, and beside it one
    rounding to the dtype (eps / 2) and ROUNDINGS of float32's."""
    checked = "losses and gradients of a step"
    for name, error in errors.items():
        if not math.isfinite(error):
            return Check(None, None, checked, f"wrong: the {name} has NaN or infinity")
    eps = torch.finfo(torch.float16 if dtype == "tf32" else DTYPES[dtype][0]).eps  # TF32 has float16's mantissa
    budgets = {name: 2 * einsum[name] + eps / 2 + ROUNDINGS * EPS for name in errors}
    worst = max(errors, key=lambda name: errors[name] / budgets[name])
    used = errors[worst] / budgets[worst]
    wrong = f"wrong: the {worst} is {errors[worst]:.1e} from float64, allowed is {budgets[worst]:.1e}"
    return Check(max(errors.values()), used, checked, "" if used <= 1 else wrong)


class Training:
    """A workload at work, as `run.Call` is for a case."""

    def __init__(self, case: Workload, device: torch.device) -> None:
        self.case, self.device, self.inputs = case, device, Batch.of(case, device)
        self.models: dict[str, nn.Module] = {}

    @cached_property
    def yardsticks(self) -> tuple[Answers, dict[str, float]]:
        """Float64, and the own einsum path's distance from it, a sequence at a time, so that they fit."""
        from complex_valued_transformer import complex_valued_transformer as client

        sequences = self.inputs.sequences()
        model = build(self.case, self.device)
        for held in (*model.parameters(), *model.buffers()):
            held.data = held.data.to(torch.promote_types(held.dtype, torch.float64))
        # The client's attention asserts that it gets what it knows as `cfloat`.
        with mock.patch.object(client, "cfloat", torch.complex128):
            exact = answers_of(model, sequences, "float64")
        einsum = answers_of(build(self.case, self.device), sequences, self.case.dtype)
        return exact, distances(einsum, exact)

    def admit(self, peer: Peer) -> Check:
        """Makes an arm's model and judges its step."""
        self.models[peer.name] = model = peer.prepare(self.case, self.device)
        exact, einsum = self.yardsticks
        errors = distances(answers_of(model, [self._batch_of(peer)], self.case.dtype), exact)
        return judge(errors, einsum, self.case.dtype)

    def _batch_of(self, peer: Peer) -> Batch:
        return self.inputs if peer.prepare.masked else self.inputs._replace(mask=None)

    def function(self, peer: Peer, name: str) -> Callable[[], object]:
        """A step of training."""
        model, batch = self.models[peer.name], self._batch_of(peer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

        def step() -> None:
            token_losses(model, batch, self.case.dtype).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def rates(self, name: str, milliseconds: float) -> dict[str, float]:
        """Tokens that are no padding."""
        return {"tokens_per_s": 1e3 * self.inputs.valid / milliseconds}
