"""x-transformers' own tests, each run twice: as they are, and with every model in them patched.

    python tests/integrations/x_transformers_suite.py PATH/tests/test_x_transformers.py [-k NAME]

PATH is a checkout or an unpacked sdist of x-transformers, of the version that is installed. Tells of every test whose
models answer otherwise, of what was refused, and the largest difference of outputs and gradients, relative to the
largest entry of what it is in. Attention drops nothing here: ours draws other masks. Whoever interrupts it is told of
what was run until then.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import inspect
import itertools
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flash_attend import patch
from flash_attend.integrations import PatchHandle
from flash_attend.integrations.judging import Judge
from flash_attend.integrations.search import find

TOLERANCE = 1e-4


class Run:
    """One test, once: what its outermost calls of models with an Attend gave, and the gradients of that."""

    def __init__(self, patched: bool) -> None:
        self.patched = patched
        self.models: list[nn.Module] = []
        self.attends: set[int] = set()
        self.replaced = 0
        self.reasons: collections.Counter[str] = collections.Counter()
        self.answers: list[dict[str, Tensor]] = []
        self.inside = False

    def __call__(self, test: Callable[[], None]) -> str:
        """Runs a test; the error with which it ended, if any."""
        call, run = nn.Module.__call__, self

        def watched(module: nn.Module, *inputs: Any, **named: Any) -> Any:
            if run.inside or not run.meet(module):
                return call(module, *inputs, **named)
            run.inside = True
            try:
                returned = call(module, *inputs, **named)
            finally:
                run.inside = False
            run.answers.append(answers(module, returned))
            return returned

        nn.Module.__call__ = watched  # type: ignore[method-assign]
        random.seed(0)  # which models draw from, too
        torch.manual_seed(0)
        try:
            test()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # pytest's skip is one, too
            return traceback.format_exc(limit=-1)
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
        return ""

    def meet(self, model: nn.Module) -> bool:
        """Whether it has an Attend; a new one is patched, if this is such a run."""
        found = [one.attend for one in find(model)]
        new = [attend for attend in found if id(attend) not in self.attends]
        if not new:
            return bool(found)
        self.models.append(model)  # and so kept alive, with its id
        self.attends |= {id(attend) for attend in new}
        for attend in new:
            attend.dropout = attend.attn_dropout.p = 0.0
        if self.patched:
            handle = self.patch(model)
            for outcome in handle.outcomes:
                if id(outcome.attend) in {id(attend) for attend in new}:
                    self.replaced += outcome.status == "replaced"
                    self.reasons[outcome.reason] += outcome.status == "refused"
        return True

    def patch(self, model: nn.Module) -> PatchHandle:
        """Those that are alike are judged once for all tests."""
        self.inside = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return patch(model)
        finally:
            self.inside = False


def answers(model: nn.Module, returned: Any) -> dict[str, Tensor]:
    """The tensors in what a model returns, and the gradients of its parameters."""
    out = {f"output{path}": tensor.detach().clone() for path, tensor in tensors("", returned)}
    loss = sum(
        (tensor.double() * torch.linspace(0.5, 1.0, tensor.numel(), dtype=torch.float64).view(tensor.shape)).mean()
        for _, tensor in tensors("", returned)
        if tensor.requires_grad and tensor.numel()
    )
    if isinstance(loss, Tensor):
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        out |= {f"gradient of {name}": x for name, x in zip(names, found, strict=True) if x is not None}
    return out


def tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        yield from itertools.chain.from_iterable(tensors(f"{path}.{name}", getattr(value, name)) for name in names)
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(tensors(f"{path}[{key!r}]", x) for key, x in value.items())
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(tensors(f"{path}[{index}]", x) for index, x in enumerate(value))


def difference(theirs: Tensor, ours: Tensor) -> float:
    """Relative to the largest entry of either; infinite where shapes differ or one is not finite where the other is."""
    if theirs.shape != ours.shape or not torch.equal(theirs.isfinite(), ours.isfinite()):
        return float("inf")
    gap, size = (theirs - ours)[theirs.isfinite()].abs(), theirs[theirs.isfinite()].abs()
    # Gradients that are nothing but rounding, as those of keys' biases, are compared with 1.
    return (gap.max() / size.max().clamp(min=1e-3)).item() if gap.numel() else 0.0


def cases(path: Path, only: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every test of a file, once for each of its parameters."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_") or only not in name:
            continue
        marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
        choices = [[*parametrized(mark.args[0], mark.args[1])] for mark in marks]
        for combination in itertools.product(*choices):
            named = {key: value for part in combination for key, value in part.items()}
            shown = ", ".join(f"{key}={value!r}"[:40] for key, value in named.items())
            yield f"{name}({shown})", lambda function=function, named=named: function(**named)


def parametrized(names: Any, values: Any) -> Iterator[dict[str, Any]]:
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    for value in values:
        value = value.values if hasattr(value, "marks") else ((value,) if len(names) == 1 else value)
        yield dict(zip(names, value, strict=True))


class Tally:
    """What came of the tests until now."""

    def __init__(self) -> None:
        self.total: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.worst = {"output": (0.0, ""), "gradient": (0.0, "")}

    def add(self, name: str, test: Callable[[], None]) -> str:
        """Runs a test twice; what is otherwise with every model patched, if anything."""
        before, after = Run(patched=False), Run(patched=True)
        errors = before(test), after(test)
        self.total.update(
            tests=1,
            models=len(after.models),
            attends=len(after.attends),
            replaced=after.replaced,
            failed=int(bool(errors[0])),
            calls=len(after.answers),
        )
        self.reasons.update(after.reasons)
        if errors[0] != errors[1] or len(before.answers) != len(after.answers):
            return f"{errors[0] or 'passed'} before, then {errors[1] or 'passed'}"
        gaps = [
            (difference(x, y[key]) if key in y else float("inf"), key)
            for x, y in zip(before.answers, after.answers, strict=True)
            for key, x in x.items()
        ]
        for kind, worst in self.worst.items():
            self.worst[kind] = max([worst, *((gap, f"{name}: {key}") for gap, key in gaps if key.startswith(kind))])
        gap, key = max(gaps, default=(0.0, ""))
        return f"{key} differs by {gap:.1e}" if gap > TOLERANCE else ""

    def __str__(self) -> str:
        lines = [", ".join(f"{count} {what}" for what, count in self.total.items())]
        lines += [f"{count:4d} refused: {reason}" for reason, count in self.reasons.most_common() if count]
        lines += [f"largest difference of an {kind}: {gap:.1e} ({at})" for kind, (gap, at) in self.worst.items()]
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("-k", dest="only", default="", help="only tests with this in their name")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th test, from the I-th on")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    verdicts: dict[Any, Any] = {}
    Judge.verdicts = property(lambda judge: verdicts, lambda judge, none: None)  # type: ignore[assignment]
    first, step = map(int, given.part.split("/"))
    chosen = [*itertools.islice(cases(given.path, given.only), first, None, step)]
    tally = Tally()
    try:
        for name, test in tqdm(chosen, unit="test", disable=None):
            if otherwise := tally.add(name, test):
                tally.total["otherwise"] += 1
                tqdm.write(f"{name}: {otherwise}")
    finally:
        print(tally, f"{len(verdicts)} kinds of Attends compared", sep="\n")
    return 1 if tally.total["otherwise"] else 0


if __name__ == "__main__":
    sys.exit(main())
