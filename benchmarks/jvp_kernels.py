"""The forward-mode kernels of jvp_flash_attention at their defaults, compiled without a GPU and read by the throughput
model, for causal calls with contiguous inputs that all have tangents.

`python -m flash_attend.kernels.aot --estimate --only tangents` sets ours beside them, where that package is installed:

    pip install --no-deps jvp_flash_attention==0.14.0

Its products with v are in TF32 whatever the dtype, and counted as fast as those of half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attend.kernels.aot import PARTS, REGISTERS, compiled_for, is_serialized, with_log
from flash_attend.kernels.estimate import Estimate, Kernel, estimate
from flash_attend.kernels.sass import disassemble, loop_works

__all__ = ["peer_estimates"]

BATCH, HEADS, LENGTH = 2, 8, 1024
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32}
DIMS = (16, 32, 64, 128, 256)  # that it serves
# What it launches with: "safe default values", by its word, on every part.
BLOCK, WARPS, STAGES, REGISTERS_AT_MOST = 32, 4, 2, 168
IN_BULK = ("sm_90", "sm_100")  # where it reads by descriptors
CAUSAL = 3


def peer_estimates(direction: str, arch: str, kind: str, dim: int) -> tuple[str, dict[str, Estimate]]:
    """Its tile, and what the model says of its loop over full blocks. Raises what the compiler raises, `ValueError` for
    a head dimension that it refuses, and `ImportError` where it is not installed."""
    if dim not in DIMS:
        raise ValueError(f"d must be one of {', '.join(map(str, DIMS))}")
    with compiled_for(arch):  # it looks for a driver as soon as it is imported
        from jvp_flash_attention import jvp_attention as peer

        kernel, arguments = _launch(peer, arch, dim, DTYPES[kind])
        options = dict(num_warps=WARPS, num_stages=STAGES, maxnreg=REGISTERS_AT_MOST, enable_fp_fusion=True)
        grid = (LENGTH // BLOCK, BATCH * HEADS, 1)
        compiled, log = with_log(lambda: kernel.warmup(*arguments, **_choices(dim), **options, grid=grid))
    shared, limit = compiled.metadata.shared, PARTS[arch].shared_memory
    tile = f"{BLOCK}x{BLOCK} w{WARPS} s{STAGES}"
    if shared > limit:
        raise MemoryError(f"{tile}: needs {shared} bytes of shared memory, the part has {limit}")
    registers = int(REGISTERS.search(log).group(1))
    ours = Kernel(
        "tangents", arch, kind, dim, dim, BLOCK, BLOCK, WARPS, STAGES, registers, shared, is_serialized(log)
    )  # fmt: skip
    # The loop over full blocks comes first.
    return tile, {"tangents": estimate(loop_works(disassemble(compiled.asm["cubin"]))[0], ours)}


def _choices(dim: int) -> dict[str, Any]:
    return dict(
        N_CTX=LENGTH, HEAD_DIM=dim, BLOCK_M=BLOCK, BLOCK_N=BLOCK, FP8_OUTPUT=False, STAGE=CAUSAL, warp_specialize=True,
        ENABLE_JVP=True, ENABLE_DROPOUT=False, MASK_TYPE=0,
    )  # fmt: skip


def _launch(peer: Any, arch: str, dim: int, dtype: torch.dtype) -> tuple[Any, tuple]:
    """The kernel that it launches on a part, and its arguments, on meta tensors."""
    with torch.device("meta"):
        q, k, v, q_t, k_t, v_t, out, out_t = torch.empty(8, BATCH, HEADS, LENGTH, dim, dtype=dtype).unbind()
        lse, mask = torch.empty(BATCH, HEADS, LENGTH), torch.empty(0, dtype=dtype)
    scale, no_mask, no_dropout = dim**-0.5, (0, 0, 0, 0), (0.0, 0)
    if arch in IN_BULK:
        blocks = [
            TensorDescriptor(x, [BATCH * HEADS * LENGTH, dim], [dim, 1], [BLOCK, dim])
            for x in (q, k, v, q_t, k_t, v_t, out, out_t)
        ]
        return peer._attn_fwd_tma, (scale, lse, BATCH, HEADS, *blocks, mask, *no_dropout, *no_mask)
    strides = [step for x in (q, k, v, q_t, k_t, v_t, out, out_t) for step in x.stride()]
    tensors = q, k, v, q_t, k_t, v_t, scale, lse, out, out_t, mask
    return peer._attn_fwd, (*tensors, *no_dropout, *strides, *no_mask, BATCH, HEADS)
