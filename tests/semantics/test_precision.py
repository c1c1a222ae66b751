"""float32 follows torch's setting for products on CUDA, said in the older words or in the newer ones.

Once the newer ones were used, torch raises at the older: every case is a process of its own, forked from one that has
imported what it needs.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SETTINGS = {
    "": "tf32x3",
    "torch.set_float32_matmul_precision('highest')": "tf32x3",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "cuda.matmul.allow_tf32 = True": "tf32",
    "cuda.matmul.allow_tf32 = True; cuda.matmul.allow_tf32 = False": "tf32x3",
    "cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "cuda.matmul.fp32_precision = 'ieee'": "tf32x3",
    "backends.fp32_precision = 'tf32'": "tf32",
    "backends.fp32_precision = 'ieee'": "tf32x3",
    "backends.fp32_precision = 'bf16'": "tf32x3",
    "mkldnn.matmul.fp32_precision = 'tf32'": "tf32x3",
    "mkldnn.matmul.fp32_precision = 'bf16'": "tf32x3",
    # What is said of CUDA's products wins over what is said of all.
    "backends.fp32_precision = 'tf32'; cuda.matmul.fp32_precision = 'ieee'": "tf32x3",
    "backends.fp32_precision = 'ieee'; cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "backends.fp32_precision = 'tf32'; cuda.matmul.fp32_precision = 'none'": "tf32",
    # Both ways in turn.
    "torch.set_float32_matmul_precision('high'); cuda.matmul.fp32_precision = 'ieee'": "tf32x3",
    "cuda.matmul.fp32_precision = 'tf32'; torch.set_float32_matmul_precision('highest')": "tf32x3",
    "cuda.matmul.fp32_precision = 'ieee'; cuda.matmul.allow_tf32 = True": "tf32",
}

FORKED = """
import os
import sys
import torch
from torch import backends
from torch.backends import cuda, mkldnn
from flash_attend import explain, flash_attention
from flash_attend.checks import normalise_inputs

for setting in sys.argv[1:]:
    if not os.fork():
        q = torch.randn(1, 2, 3, 8)
        before = flash_attention(q, q, q)
        exec(setting)
        assert torch.equal(flash_attention(q, q, q), before)  # the einsum path on a CPU is exact at any setting
        assert explain(q, q, q).plan
        assert {normalise_inputs(x, x, x)[1].precision for x in (q.half(), q.bfloat16(), q.double())} == {"ieee"}
        print(normalise_inputs(q, q, q)[1].precision, flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, setting
"""

COMPILED = """
import torch
from torch.backends import cuda
from flash_attend import flash_attention

def backend(graph, inputs):
    told = str([node.args for node in graph.graph.nodes if node.op == "call_function"])
    precision = "tf32x3" if "tf32x3" in told else "tf32" if "tf32" in told else told
    return lambda *inputs: (print(precision), graph(*inputs))[1]

q = torch.randn(1, 2, 3, 8)
attend = torch.compile(lambda q: flash_attention(q, q, q), backend=backend, fullgraph=True)
for precision in ("ieee", "tf32", "ieee", "none", "tf32"):
    cuda.matmul.fp32_precision = precision
    attend(q)
torch.backends.fp32_precision = "tf32"
cuda.matmul.fp32_precision = "none"  # as all are
attend(q)
torch.set_float32_matmul_precision("highest")
attend(q)
"""


def _printed(script: str, *arguments: str) -> list[str]:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="forks a process for each setting")
def test_float32_follows_torch() -> None:
    assert dict(zip(SETTINGS, _printed(FORKED, *SETTINGS), strict=True)) == SETTINGS


def test_a_graph_does_not_outlive_the_setting_that_it_was_made_for() -> None:
    """Whichever setting says it, and before as after another."""
    assert _printed(COMPILED) == ["tf32x3", "tf32", "tf32x3", "tf32x3", "tf32", "tf32", "tf32x3"]
