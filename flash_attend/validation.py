"""What runs on a GPU have shown of which backend: data, with its source."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EVIDENCE", "Evidence", "EvidenceTable"]


@dataclass(frozen=True)
class Evidence:
    """A backend with one of its backwards was right on a part, and perhaps faster there than what serves without it."""

    gpu: str  # the part's name, e.g. "NVIDIA H200"
    triton: str
    date: str  # ISO
    results: str  # path of the evidence in the repository
    faster: bool = False


EvidenceTable = dict[tuple[str, str, str], Evidence]
EVIDENCE: EvidenceTable = {}  # by backend, backward and arch
