"""Documents that lie in rows one after another, as packed sequences."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from flash_attend.options import check_length, shown
from flash_attend.packed import values_are_checked

__all__ = ["cu_seqlens_of_documents"]


def cu_seqlens_of_documents(document_ids: Tensor, most: int | None = None) -> Tensor:
    """Where documents begin and end, as `flash_attention_packed` takes it, by which document each token is of.

    The mask `document_ids[:, None, :, None] == document_ids[:, None, None, :]` of q, k and v `(b, h, i, d)` is the same
    as these sequences of `(b * i, h, d)`: `q.transpose(1, 2).flatten(0, 1)`, which is a view of what projections give.

    Args:
        document_ids: `(b, i)`, integers: one for each document of a row, whose tokens are neighbours. What is padding
            is a document too.
        most: no fewer than there are documents in all. Each that there is not costs a program for every head, and
            tokens of those beyond are in no sequence. Default: on a CPU as many as there are, elsewhere `b * i`.

    Returns:
        `cu_seqlens (most + 1,)`, int64, made on the device with no host sync. Behind the last document sequences are
        empty.

    Raises:
        TypeError, ValueError: an argument is wrong; on a CPU, and elsewhere under `FLASH_ATTEND_CHECK_LENGTHS=1`, also
            where a document comes again after another, or there are more than `most`.
    """
    _check(document_ids)
    batch, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)  # (b, i)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    looked_at = values_are_checked(document_ids)
    if looked_at:
        _check_values(document_ids, begins)
        found = int(begins.sum())
        if most is not None and found > most:
            raise ValueError(f"most must be no less than the number of documents, {found}, got {most}")
        most = found if most is None and document_ids.device.type == "cpu" else most
    count = batch * length if most is None else check_length("most", most)
    numbers = begins.flatten().cumsum(0)  # from 1 on
    return torch.searchsorted(numbers, torch.arange(1, count + 2, device=document_ids.device))


def _check(document_ids: Tensor) -> None:
    if not isinstance(document_ids, Tensor):
        raise TypeError(f"document_ids must be a torch.Tensor, got {shown(document_ids)}")
    if document_ids.is_floating_point() or document_ids.is_complex():
        raise TypeError(f"document_ids must be integers, got {document_ids.dtype}")
    if document_ids.ndim != 2:
        raise ValueError(f"document_ids must be (b, i), got {tuple(document_ids.shape)}")


def _check_values(document_ids: Tensor, begins: Tensor) -> None:
    """Whether each row's documents come once. Reads the values."""
    rows, ids = begins.nonzero()[:, 0].tolist(), document_ids[begins].tolist()
    for (row, document), times in Counter(zip(rows, ids, strict=True)).items():
        if times > 1:
            raise ValueError(f"document_ids must have a document's tokens together, got {document} again in row {row}")
