"""FlexAttention's kernels at their defaults, compiled without a GPU: the Triton templates of the installed torch, as
inductor fills them in for a causal call with contiguous inputs, read by the throughput model.

`python -m flash_attend.kernels.aot --estimate` sets our kernels beside them.
"""

from __future__ import annotations

import importlib.util
import tempfile
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import jinja2
import torch
import triton
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_attend.kernels.aot import PARTS, REGISTERS, is_serialized, with_log
from flash_attend.kernels.estimate import PRODUCTS, Estimate, Kernel, estimate, multiply_adds
from flash_attend.kernels.sass import LoopWork, disassemble, loop_works

__all__ = ["peer_estimates"]

TEMPLATES = Path(torch.__file__).parent / "_inductor/kernel/flex/templates"
FILES = {
    "forward": ("flex_attention", "utilities", "common"),
    "backward": ("flex_backwards", "utilities"),
}
BATCH, HEADS, LENGTH = 2, 8, 1024
SPARSE_BLOCK = 128  # of a block mask, by default
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32}
BLOCKS = ("KV_NUM_BLKS", "KV_IDX", "FULL_KV_NUM_BLKS", "FULL_KV_IDX")
ARGUMENTS = {
    "forward": ("Q", "K", "V", "LSE", "MAX", *BLOCKS),
    "backward": (
        "Q", "K", "V", "LSE", "DELTA", "DO", "DQ", "DV", "KV_NUM_BLKS", "KV_IDX", "Q_NUM_BLKS", "Q_IDX",
        "FULL_KV_NUM_BLKS", "FULL_KV_IDX", "FULL_Q_NUM_BLKS", "FULL_Q_IDX",
    ),
}  # fmt: skip
TENSORS = ("Q", "K", "V", "DO", "DQ", "DV", "out_ptr0")  # of the call's dtype
SUMS = ("LSE", "DELTA", "MAX")  # of float32; the others are indices


def peer_estimates(direction: str, arch: str, kind: str, dim: int) -> tuple[str, dict[str, Estimate]]:
    """The tile that FlexAttention takes, and what the model says of its loops over full blocks, by the kernel of ours
    that does the same work. Raises what the compiler raises, and `MemoryError` where the tile does not fit."""
    config = _default(direction, arch, dim, DTYPES[kind])
    constants, blocks = _constants(direction, kind, dim, config)
    tile = f"{'x'.join(str(size) for pair in blocks.values() for size in pair)} w{config.num_warps}"
    with tempfile.TemporaryDirectory() as folder:
        kernel = _module(Path(folder), _source(direction, dim, constants)).kernel
        compiled, log = with_log(partial(_compile, kernel, arch, DTYPES[kind], config))
    shared, limit = compiled.metadata.shared, PARTS[arch].shared_memory
    tile += f" s{config.num_stages}"
    if shared > limit:
        raise MemoryError(f"{tile}: needs {shared} bytes of shared memory, the part has {limit}")
    width = triton.next_power_of_2(dim)
    loops = loop_works(disassemble(compiled.asm["cubin"]))
    found = {}
    for name, (block_m, block_n) in blocks.items():
        ours = Kernel(
            name, arch, kind, dim, width, block_m, block_n, config.num_warps, config.num_stages,
            int(REGISTERS.search(log).group(1)), shared, is_serialized(log),
        )  # fmt: skip
        found[name] = max((estimate(loop, ours) for loop in _loops_of(ours, loops)), key=lambda one: one.tflops)
    return tile, found


def _default(direction: str, arch: str, dim: int, dtype: torch.dtype) -> Any:
    heuristic = CUDAConfigHeuristic()
    of_direction = dict(forward=heuristic.get_flex_attn_fwd_configs, backward=heuristic.get_flex_attn_bwd_configs)
    with patch.object(torch.cuda, "get_device_capability", lambda: PARTS[arch].capability):
        return of_direction[direction](dim, dtype)[0]


def _constants(direction: str, kind: str, dim: int, config: Any) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    width = triton.next_power_of_2(dim)
    common = dict(
        PRESCALE_QK=False, ROWS_GUARANTEED_SAFE=False, BLOCKS_ARE_CONTIGUOUS=False, WRITE_DQ=True, OUTPUT_MAX=False,
        OUTPUT_LOGSUMEXP=True, FLOAT32_PRECISION="'tf32'" if kind == "tf32" else "'ieee'", IS_DIVISIBLE=True,
        SM_SCALE=dim**-0.5, GQA_SHARED_HEADS=1, HAS_FULL_BLOCKS=True, QK_HEAD_DIM=dim, QK_HEAD_DIM_ROUNDED=width,
        V_HEAD_DIM=dim, V_HEAD_DIM_ROUNDED=width, SAFE_HEAD_DIM=dim == width, USE_TMA=False,
        SPARSE_Q_BLOCK_SIZE=SPARSE_BLOCK, SPARSE_KV_BLOCK_SIZE=SPARSE_BLOCK, INDEX_DTYPE="tl.int32",
    )  # fmt: skip
    if direction == "forward":
        blocks = {"forward": (config.block_m, config.block_n)}
        return common | dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n), blocks
    blocks = {"backward_kv": (config.block_m1, config.block_n1), "backward_q": (config.block_m2, config.block_n2)}
    own = dict(
        BLOCK_M1=config.block_m1, BLOCK_N1=config.block_n1, BLOCK_M2=config.block_m2, BLOCK_N2=config.block_n2
    )  # fmt: skip
    return common | own, blocks


def _source(direction: str, dim: int, constants: dict[str, Any]) -> str:
    """The kernel's source, with sizes and strides as literals."""
    sparse = LENGTH // SPARSE_BLOCK
    strides = [HEADS * LENGTH * dim, LENGTH * dim, dim, 1]
    of_blocks = {"NUM_BLKS": [sparse, sparse, 1], "IDX": [sparse * sparse, sparse * sparse, sparse, 1]}
    arguments = [f"arg_{name}" for name in ARGUMENTS[direction]] + ["out_ptr0"]
    defines = "\n".join(f"{name} : tl.constexpr = {value}" for name, value in constants.items())

    def def_kernel(*names: str) -> str:
        body = "\n".join([defines, *(f"{name} = arg_{name}" for name in names)])
        return f"@triton.jit\ndef kernel({', '.join(arguments)}):\n{textwrap.indent(body, '    ')}"

    def stride(name: str, index: int | None = None) -> str:
        found = next((of for end, of in of_blocks.items() if name.endswith(end)), strides)
        return ", ".join(map(str, found)) if index is None else str(found[index])

    def size(name: str, index: int) -> str:
        return str(([1, 1, sparse] if name.endswith("NUM_BLKS") else [BATCH, HEADS, LENGTH, dim])[index])

    def modification(subgraph_number: int, output_name: str, **given: str) -> str:
        """Causal, without a change of scores; of the backward, 1 is the gradient of that change."""
        if subgraph_number == 0:
            return f"{output_name} = ({given['score']})"
        if subgraph_number == (1 if direction == "forward" else 2):
            return f"{output_name} = ({given['m']}) >= ({given['n']})"
        return f"{output_name} = ({given['grad_score_mod']})" if subgraph_number == 1 else "pass"

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        offset = " + ".join(f"{step} * ({index})" for index, step in zip(indices, strides, strict=True))
        return f"tl.store(out_ptr0 + ({offset}), {value}.to(out_ptr0.dtype.element_ty), {mask})"

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)  # of source, not of a web page
    environment.filters["indent_except_first"] = lambda text, levels: text.replace("\n", "\n" + "    " * levels)
    template = "\n".join((TEMPLATES / f"{name}.py.jinja").read_text() for name in FILES[direction])
    return "import triton\nimport triton.language as tl\n\n" + environment.from_string(template).render(
        def_kernel=def_kernel,
        stride=stride,
        size=size,
        gen_argdefs=lambda: ", ".join(arguments),
        gen_defines=lambda: defines,
        modification=modification,
        store_output=store_output,
        HAS_FULL_BLOCKS=True,
        USE_TMA=False,
    )


def _module(folder: Path, source: str) -> ModuleType:
    """Triton reads the source of what it compiles from a file."""
    path = folder / "flex_kernel.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(kernel: Any, arch: str, dtype: torch.dtype, config: Any) -> Any:
    types = dict.fromkeys(SUMS, "*fp32") | dict.fromkeys(TENSORS, "*bf16" if dtype == torch.bfloat16 else "*fp32")
    names = kernel.arg_names
    signature = {name: types.get(name.removeprefix("arg_"), "*i32") for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(names))}
    major, minor = PARTS[arch].capability
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs={}, attrs=aligned),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options=dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True),
    )


def _loops_of(kernel: Kernel, loops: list[LoopWork]) -> Iterator[LoopWork]:
    """Those that do the work of a kernel of ours, by their multiply-adds."""
    expected = PRODUCTS[kernel.name] * kernel.block_m * kernel.block_n * kernel.width
    for loop in loops:
        if any(abs(multiply_adds(loop, kernel) / expected - redundancy) < 0.02 for redundancy in (1, 1.25, 1.5, 2)):
            yield loop
