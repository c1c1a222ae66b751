"""What runs on a GPU have shown of which backend: data, with the evidence. Nothing else makes a kernel a default.

"auto" takes a backend where it was shown right (`VALIDATED`), and all but the plain kernels of "triton", which are only
compared with the einsum path, where it was shown faster too (`FASTER`).
"""

from __future__ import annotations

from dataclasses import dataclass

from flash_attend.spec import AttentionSpec, MaskKind, kind_of

__all__ = ["FASTER", "VALIDATED", "Calls", "Measurement", "Run", "Validation"]


@dataclass(frozen=True)
class Run:
    """What ran where."""

    gpu: str  # the part's name, e.g. "NVIDIA H200"
    torch: str
    triton: str
    date: str  # ISO
    commit: str
    results: str  # path of the evidence in the repository


@dataclass(frozen=True)
class Validation(Run):
    """One backend was right on one part: every proof of `benchmarks/validate.py` passed there."""


@dataclass(frozen=True)
class Calls:
    """Calls that the benchmarks tell apart: what was measured for one of them says nothing of the others."""

    kind: str  # of the products, as `spec.kind_of` has it
    head_dim: int
    value_dim: int
    mask: MaskKind

    def __str__(self) -> str:
        return f"{self.kind}, d {self.head_dim}, dv {self.value_dim}, mask {self.mask.name.lower()}"

    def hold(self, spec: AttentionSpec) -> bool:
        """Whether a call is one of these."""
        mine = (self.kind, self.head_dim, self.value_dim, self.mask)
        return mine == (kind_of(spec), spec.head_dim, spec.value_dim, spec.mask)


@dataclass(frozen=True)
class Measurement(Run):
    """One backend was faster on one part, for these calls, than every slower one of `dispatch.BACKENDS` beside it."""

    calls: tuple[Calls, ...]


# (backend, arch) -> the run that showed it right. A backend without a row here is never chosen by "auto" on that arch.
VALIDATED: dict[tuple[str, str], Validation] = {}
# (backend, arch) -> the run that showed it faster. "triton" needs no row, and "math" none in either table.
FASTER: dict[tuple[str, str], Measurement] = {}
