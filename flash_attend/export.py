"""Programs that need nothing of ours: what an exported program holds of attention, in operators of torch alone.

program = torch.export.export(model, example)
program = program.run_decompositions(flash_attend.export.decompositions())
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flash_attend.autograd import backward_in_parts, forward_in_parts
from flash_attend.ops import BACKWARD, FORWARD

__all__ = ["decompositions"]


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """What our operators are made of, for `torch.export.ExportedProgram.run_decompositions`: the einsum path, whatever
    backend a program was exported with. A program without them runs where flash_attend is not installed, at every
    length that it was exported for, and holds all scores, `(b, h, i, j)`, in memory. Of the rules for NaN and infinity
    one does not hold in it: those in a row of v that some queries see may show in others, too."""
    return {FORWARD: partial(forward_in_parts, guard=False), BACKWARD: backward_in_parts}
