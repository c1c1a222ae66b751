"""How many variants of its kernels Triton compiles: one for each kernel and mode, whatever the lengths."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
from torch import Tensor

from flash_attend.checks import normalise_inputs
from flash_attend.kernels import aot
from flash_attend.kernels.backward import attention_backward
from flash_attend.kernels.configs import Tile, Tiles, select_hopper_tiles
from flash_attend.kernels.forward import attention_forward
from flash_attend.kernels.launch import Launch, Prepared, recorded_launches
from flash_attend.kernels.tangents import attention_tangents
from flash_attend.operands import Operands, Tangents
from flash_attend.spec import AttentionSpec, MaskKind

# One, odd, even, and multiples of 8, 16 and 128: what Triton makes variants of where it is let.
PAIRS = tuple(product((1, 2, 7, 16, 100, 128, 333), (1, 3, 16, 24, 64, 77, 128, 1000)))
TILES = Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2))
SPEC = AttentionSpec(
    batch=2, heads=4, kv_heads=4, queries=300, keys=300, head_dim=64, value_dim=64, dtype=torch.float16, scale=0.125
)
MODES = {
    "plain": {},
    "causal": dict(causal=True),
    "key_mask": dict(mask=MaskKind.KEY),
    "key_mask_causal_dropout": dict(mask=MaskKind.KEY, causal=True, dropout_p=0.1),
    "key_mask_per_head_grouped": dict(mask=MaskKind.KEY, mask_per_head=True, kv_heads=2),
    "dense_mask": dict(mask=MaskKind.DENSE),
    "dense_mask_causal_grouped": dict(mask=MaskKind.DENSE, causal=True, kv_heads=1),
    "negative_scale": dict(scale=-0.125),
    "two_part_dims": dict(head_dim=80, value_dim=160, dtype=torch.float32, precision="tf32"),
    "odd_dims": dict(head_dim=33, value_dim=7),
}
ATTENTION = ("forward_kernel", "delta_kernel", "backward_kv_kernel", "backward_q_kernel")
OF_MASK = {
    MaskKind.NONE: (),
    MaskKind.KEY: ("key_schedule_kernel",),
    MaskKind.DENSE: ("dense_schedule_kernel", "line_kernel"),
}


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[Launch]], dict[str, int]]:
    """Counts the variants of each kernel that launches take: what Triton sets out to compile, and is kept from."""

    def count(launches: Iterable[Launch]) -> dict[str, int]:
        found = set()

        def skip(*, key: str, fn, **_) -> bool:
            found.add((fn.name.rpartition(".")[2], key))
            return True

        with monkeypatch.context() as patch, aot.compiled_for("sm_90"):
            patch.setattr(triton.knobs.runtime, "jit_cache_hook", skip)
            for launch in launches:
                # Whatever other tests compiled, here nothing is.
                kernel = launch.prepared.kernel
                patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
                assert aot.compile_launch(launch) is None
        return dict(Counter(name for name, _ in found))

    return count


def launches_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> list[Launch]:
    """What a forward and a backward launch for tensors on the meta device, through their strides."""
    (q, k, v, mask, *_), spec = normalise_inputs(q, k, v, mask=mask, dropout_p=dropout_p)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
    operands = Operands(q, k, v, mask, seed)
    with recorded_launches() as launches:
        out, lse, schedule = attention_forward(operands, spec, TILES)
        attention_backward(torch.empty_like(out), None, operands, out, lse, schedule, spec, TILES, (True,) * 3)
    return launches


def new(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("mode", MODES)
def test_fifty_lengths_compile_once(variants: Callable, mode: str) -> None:
    assert len(PAIRS) > 50
    spec = replace(SPEC, **MODES[mode])
    launches = []
    # A single query sees all keys, causal or not: it is of the variant that is not.
    pairs = [pair for pair in PAIRS if pair[0] > 1 or not spec.causal]
    for number, (queries, keys) in enumerate(pairs):
        # Batch, heads, scale and probability change as well: none of them is known when a kernel is compiled.
        of_call = replace(
            spec,
            queries=queries,
            keys=keys,
            batch=(1, 2, 3, 16)[number % 4],
            heads=spec.heads * (1, 2, 4, 3)[number // 4 % 4],
            kv_heads=spec.kv_heads * (1, 2, 4, 3)[number // 4 % 4],
            scale=spec.scale * (number + 1),
            dropout_p=spec.dropout_p * (1 + number % 9),
        )
        launches += aot.record_call(of_call, TILES)
    assert variants(launches) == dict.fromkeys((*OF_MASK[spec.mask], *ATTENTION), 1)


@pytest.mark.parametrize("mode", ("plain", "key_mask_per_head_grouped"))
def test_fifty_lengths_compile_the_fused_backward_once(variants: Callable, mode: str) -> None:
    spec, tiles = replace(SPEC, **MODES[mode]), TILES._replace(backward_fused=Tile(32, 32, 4, 2))
    launches = []
    for number, (queries, keys) in enumerate(PAIRS):
        of_call = replace(spec, queries=queries, keys=keys, batch=1 + number % 4, scale=spec.scale * (number + 1))
        launches += aot.record_call(of_call, tiles)
    expected = (*OF_MASK[spec.mask], "forward_kernel", "delta_kernel", "backward_kv_kernel")
    assert variants(launches) == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("mask", (MaskKind.NONE, MaskKind.KEY), ids=("plain", "key_mask"))
def test_fifty_lengths_compile_the_forward_for_hopper_once(variants: Callable, mask: MaskKind) -> None:
    spec = replace(SPEC, head_dim=128, value_dim=128, dtype=torch.bfloat16, mask=mask)
    tiles = select_hopper_tiles(spec, aot.PARTS["sm_90"])
    launches = []
    for number, (queries, keys) in enumerate(PAIRS):
        heads = spec.heads * (1 + number % 3)
        of_call = replace(spec, queries=queries, keys=keys, heads=heads, batch=1 + number % 4, scale=1.0 + number)
        launches += [aot.record_call(of_call, tiles, "hopper")[0 if mask == MaskKind.NONE else 1]]
    assert variants(launches) == {"hopper_forward_kernel": 1}


def test_layouts_compile_once(variants: Callable) -> None:
    """Where every row can be read by wide loads, no order of dimensions in memory is a variant, of a mask neither."""
    plain, inside = new(2, 4, 100, 64), new(2, 100, 4, 64).transpose(1, 2)
    packed = new(2, 100, 3, 4, 64).permute(2, 0, 3, 1, 4)
    masks = (
        new(2, 100, dtype=torch.bool),
        new(100, 2, dtype=torch.bool).T,
        new(1, 4, 1, 100, dtype=torch.bool),
        new(2, 1, 1, 100, dtype=torch.bool).expand(2, 4, 100, 100),
    )
    launches = [
        launch
        for qkv, mask in product(((plain,) * 3, (inside,) * 3, (plain, inside, plain), packed), masks)
        for launch in launches_of(*qkv, mask)
    ]
    assert variants(launches) == dict.fromkeys((*OF_MASK[MaskKind.KEY], *ATTENTION), 1)


def test_a_variant_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts here as one variant is one compiled kernel."""
    first, second, third = (
        aot.record_call(replace(SPEC, **changes), TILES)[0]
        for changes in (dict(queries=1, keys=16), dict(queries=333, keys=7), dict(head_dim=16))
    )
    kernel = first.prepared.kernel
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    with aot.compiled_for("sm_90"):
        compiled = aot.compile_launch(first)
        assert compiled.asm["cubin"]
        assert aot.compile_launch(second) is compiled
        assert aot.compile_launch(third) is not compiled


# ---------------------------------------------------------------------------------------------------------------------
# What does make a variant
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    (
        (dict(head_dim=80), dict(forward_kernel=2, delta_kernel=1, backward_kv_kernel=2, backward_q_kernel=2)),
        (dict(value_dim=128), dict.fromkeys(ATTENTION, 2)),
        (dict(dtype=torch.bfloat16), dict.fromkeys(ATTENTION, 2)),
        (dict(causal=True), dict(forward_kernel=2, delta_kernel=1, backward_kv_kernel=2, backward_q_kernel=2)),
        (dict(kv_heads=2), dict(forward_kernel=1, delta_kernel=1, backward_kv_kernel=2, backward_q_kernel=1)),
    ),
)
def test_a_mode_is_a_variant(variants: Callable, change: dict, expected: dict[str, int]) -> None:
    launches = [*aot.record_call(SPEC, TILES), *aot.record_call(replace(SPEC, **change), TILES)]
    assert variants(launches) == expected


def test_tiles_are_variants(variants: Callable) -> None:
    wider = TILES._replace(forward=Tile(64, 64, 4, 2))
    expected = dict(forward_kernel=2, delta_kernel=1, backward_kv_kernel=1, backward_q_kernel=1)
    assert variants([*aot.record_call(SPEC, TILES), *aot.record_call(SPEC, wider)]) == expected


def test_what_is_prepared_serves_one_dtype_of_each_tensor() -> None:
    """What runs again is looked up by nothing else: slopes and sinks may come in q's dtype or in float32."""
    q, k, v = (new(2, 4, 100, 64) for _ in range(3))
    dtypes = defaultdict(set)
    for slopes, sinks in product((torch.float16, torch.float32), repeat=2):
        others = dict(alibi_slopes=new(4, dtype=slopes), sinks=new(4, dtype=sinks), bias=new(1, 4, 100, 100))
        operands, spec = normalise_inputs(q, k, v, **others)
        tangents = Tangents(q, sinks=operands.sinks)
        with recorded_launches() as launches:
            out, lse, kept = attention_forward(operands, spec, TILES)
            attention_backward(out, None, operands, out, lse, kept, spec, TILES, (True,) * 5)
            attention_tangents(operands, tangents, spec, TILES)
        for launch in launches:
            dtypes[id(launch.prepared)].add(tuple(None if x is None else x.dtype for x in launch.tensors))
    assert max(map(len, dtypes.values())) == 1


def test_rows_without_wide_loads_are_a_variant(variants: Callable) -> None:
    aligned, odd = new(2, 4, 100, 64), new(2, 4, 100, 67)[..., :64]
    expected = dict(forward_kernel=2, delta_kernel=1, backward_kv_kernel=2, backward_q_kernel=2)
    assert variants([*launches_of(*[aligned] * 3), *launches_of(odd, aligned, aligned)]) == expected


def test_the_count_sees_what_triton_specializes(variants: Callable) -> None:
    """The same lengths, handed to a kernel that does not say which numbers it is not to be specialized on."""

    @triton.jit
    def careless_kernel(X, n):
        pass

    lengths = {length for pair in PAIRS for length in pair}
    launches = [Launch(Prepared(careless_kernel, 1, (length,), {}, num_warps=4), (new(8),)) for length in lengths]
    assert variants(launches) == {"careless_kernel": 3}  # for 1, for multiples of 16, for the rest
