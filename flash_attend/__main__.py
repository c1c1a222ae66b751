"""What a bug report needs to say about the machine, and what backends are chosen by there."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence
from itertools import groupby

import torch
from tqdm import tqdm

from flash_attend import __version__
from flash_attend.backends import BACKENDS
from flash_attend.check import PRODUCTS, servable
from flash_attend.dispatch import LOOKING, choose, judge
from flash_attend.evidence import Finding, Store
from flash_attend.explanation import Explanation
from flash_attend.isolation import Failed, Isolated
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget, driver_version
from flash_attend.tuning import grid, tune
from flash_attend.variant import Variant

__all__ = ["check_all", "main", "report"]

CHECK = "flash_attend.check:answer"

# A call of the kind the kernels are for; another one can be judged differently, which is what `explain` is for.
REPRESENTATIVE = AttentionSpec(
    batch=2,
    heads=8,
    kv_heads=8,
    queries=4096,
    keys=4096,
    head_dim=64,
    value_dim=64,
    dtype=torch.float16,
    mask=MaskKind.KEY,
    causal=True,
    scale=64**-0.5,
)
REPRESENTATIVE_IN_WORDS = "float16, b 2, h 8, i = j = 4096, d = dv = 64, causal with key padding"


def report() -> str:
    """The whole report, one fact a line."""
    lines = [f"{name:<13} {value}" for name, value in _versions().items()]
    devices = [torch.device("cpu"), *_gpus()]
    if not _gpus():
        lines.append(f"{'GPU':<13} none")
    lines += [f"{f'GPU {device.index}':<13} {_describe_gpu(device)}" for device in _gpus()]

    lines += ["", f"backends for {REPRESENTATIVE_IN_WORDS}"]
    for device in devices:
        target = DeviceTarget.of(device)
        plan, verdicts = choose(REPRESENTATIVE, target, knowledge=LOOKING), judge(REPRESENTATIVE, target)
        lines.append(f"{device}: {Explanation(plan, '', verdicts, target)}")

    for device in devices:
        store = Store.of(device)
        if device.type == "cuda" or store.findings():
            lines += ["", f"known of {device}, in {store.folder}", *_describe_store(store)]
    return "\n".join(lines)


def _gpus() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


def _describe_store(store: Store) -> list[str]:
    found = store.findings()
    wrong = [f"  {variant}: {finding.reason}" for variant, finding in found.items() if not finding.right]
    wrong += [f"  {variant}: {who}, died or was ended in its check" for variant, who in store.died().items()]
    right = sum(finding.right for finding in found.values())
    lines = [f"  {right} variant{'s' * (right != 1)} right, {len(wrong)} not", *wrong]
    return [*lines, *(f"  {name}: {reason}" for name, reason in store.reasons_of_tuned().items())]


def _versions() -> dict[str, str]:
    cpu = DeviceTarget.of(torch.device("cpu"))
    triton = cpu.triton or "not installed"
    if cpu.triton and (fault := BACKENDS["triton"].fault()):
        triton += f", but {fault}"
    if cpu.interpreted:
        triton += " (interpreting: TRITON_INTERPRET is set)"
    return {
        "flash_attend": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "einops": importlib.metadata.version("einops"),
        "CUDA of torch": torch.version.cuda or "none",
        "driver": driver_version(),
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }


def _describe_gpu(device: torch.device) -> str:
    target = DeviceTarget.of(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    facts = [
        target.name,
        target.arch or "no CUDA compute capability",
        f"{memory / 2**30:.1f} GiB",
        f"{target.multiprocessors} SMs",
        f"{target.shared_memory} bytes of shared memory a block",
    ]
    return ", ".join(facts)


# ---------------------------------------------------------------------------------------------------------------------
# check
# ---------------------------------------------------------------------------------------------------------------------

LONGEST_CHECK = 300.0  # seconds for one variant, most of them for compiling


def check_all(
    asked: Sequence[tuple[torch.device, Variant]], limit: float = LONGEST_CHECK
) -> dict[tuple[torch.device, Variant], Finding]:
    """The findings by device and variant, each of a check of its own: a family of variants in one process, which may
    crash or take longer than `limit` seconds and then costs that variant alone. What died before is tried again."""
    findings = {}
    with tqdm(total=len(asked), unit="variant", desc="checking", file=sys.stderr, disable=None) as bar:
        for _, family in groupby(asked, key=lambda one: (one[0], one[1].backend, one[1].backward, one[1].kind[:2])):
            with Isolated(CHECK) as process:
                for device, variant in family:
                    try:
                        finding = Finding(*process.ask([str(device), variant], limit))
                    except Failed as failure:  # its mark stays, and refuses it from now on
                        finding = Finding(False, str(failure))
                    findings[device, variant] = finding
                    bar.update()
    return findings


def _variants(part: DeviceTarget, store: Store) -> list[Variant]:
    """Those of common calls, and before them whatever was refused."""
    refused = [variant for variant, finding in store.findings().items() if not finding.right]
    return list(dict.fromkeys([*refused, *store.died(), *servable(part)]))


def _check(options: argparse.Namespace) -> int:
    parts = {DeviceTarget.of(device): device for device in _gpus()}
    asked = [(device, variant) for part, device in parts.items() for variant in _variants(part, Store.of(device))]
    asked = [(device, variant) for device, variant in asked if re.search(options.only, str(variant))]
    if not asked:
        print("nothing to check: what serves here needs no evidence")
        return 0
    before = {one: Store.of(one[0]).finding(one[1]) for one in asked}
    findings = {one: found for one, found in before.items() if found and found.right and not options.again}
    findings |= check_all([one for one in asked if one not in findings], options.limit)
    for (device, variant), finding in findings.items():
        print(f"{'right' if finding.right else 'WRONG'}  {device} {variant}: {finding.reason}")
    wrong = sum(not finding.right for finding in findings.values())
    print(f"{len(findings) - wrong} right, {wrong} not")
    return int(wrong > 0)


# ---------------------------------------------------------------------------------------------------------------------
# tune
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = [(2048, 2048), (1, 16384)]
MASKED = ("none", "none-causal", "key", "key-causal", "dense", "dense-causal")


def _tune(options: argparse.Namespace) -> int:
    if not _gpus():
        print("nothing to tune: there is no GPU")
        return 0
    dims = [(d, dv) for d in options.d for dv in (options.dv or [d])]
    calls = grid(options.dtype, dims, options.mask, options.length, tokens=options.tokens, width=options.width)
    for kind, won in tune(calls, minutes=options.minutes).items():
        print(f"{kind}: {won}")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _lengths(text: str) -> tuple[int, int]:
    queries, _, keys = text.partition("x")
    return _count(queries), _count(keys or queries)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def main(arguments: list[str] | None = None) -> int:
    """Prints the report, or checks, or tunes."""
    parser = argparse.ArgumentParser(prog="python -m flash_attend", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("report", help="what a bug report needs, and what is known of this machine; the default")
    checks = commands.add_parser("check", help="has each variant of the kernels check itself on the GPUs at hand")
    checks.add_argument(
        "--only", type=_pattern, default="", metavar="REGEX", help="those whose name it finds, e.g. 'bfloat16 d64 '"
    )
    checks.add_argument("--again", action="store_true", help="also those that were right before")
    checks.add_argument("--limit", type=float, default=LONGEST_CHECK, metavar="SECONDS", help="for each variant")
    tunes = commands.add_parser("tune", help="measures what is fastest on the GPUs at hand, for calls like these")
    tunes.add_argument("--minutes", type=float, default=10.0, help="when to stop; the same again goes on, default 10")
    tunes.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=sorted({dtype for dtype, _ in PRODUCTS}))
    tunes.add_argument("--d", nargs="+", type=_count, default=[64, 128], help="head dimensions, default 64 128")
    tunes.add_argument("--dv", nargs="+", type=_count, help="of the values, default those of the keys")
    tunes.add_argument("--mask", nargs="+", default=["none", "none-causal", "key-causal"], choices=MASKED)
    tunes.add_argument(
        "--length", nargs="+", type=_lengths, default=LENGTHS, metavar="N|IxJ",
        help="queries and keys, default 2048, and 1x16384: one query against a long cache, without gradients",
    )  # fmt: skip
    tunes.add_argument("--tokens", type=_count, default=16384, help="of a batch, default 16384")
    tunes.add_argument("--width", type=_count, default=2048, help="of a model: heads times d, default 2048")
    options = parser.parse_args(arguments)
    if options.command == "check":
        return _check(options)
    if options.command == "tune":
        return _tune(options)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
