"""Which kernels have been proven on which part: data, with the evidence. Nothing else makes a kernel a default."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["VALIDATED", "Validation"]


@dataclass(frozen=True)
class Validation:
    """One backend, run on one part: `pytest -m gpu` passed there, and the log is in the repository."""

    gpu: str  # the part's name, e.g. "NVIDIA H200"
    torch: str
    triton: str
    date: str  # ISO
    commit: str
    results: str  # path of the evidence in the repository


# (backend, arch) -> the run that showed it right. A backend without a row here is never chosen by "auto" on that arch.
VALIDATED: dict[tuple[str, str], Validation] = {}
