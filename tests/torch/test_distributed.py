"""On two processes: data parallel training gives what one process gives, and sharded tensors stay where they are, but
for keys that ranks share, of which `test_context_parallel.py` counts what is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Partial, Replicate, Shard

from ranks import RANKS, SAME_SUMS, Call, Ranks, answer, attend, attend_compiled, refusal, train
from sequence_ranks import compiles

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(str(tmp_path_factory.mktemp("ranks") / "rendezvous"))
    yield processes
    processes.close()


@pytest.mark.parametrize("how", ("ddp", "fsdp"))
def test_training_gives_what_one_process_gives(ranks: Ranks, how: str) -> None:
    """Parallel training rounds the mean over the batch in another order; beyond that nothing may differ."""
    truth, single = train("alone", torch.float64), train("alone", torch.float32)
    first, second = ranks.run(train, how, torch.float32)
    for ours, theirs in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(ours, theirs), "the ranks differ"

    def error(found: tuple) -> float:
        return max(
            (x - y).abs().max().item() for x, y in zip((found[0], *found[1]), (truth[0], *truth[1]), strict=True)
        )

    assert 0 < error(first) <= 4 * error(single)


# ---------------------------------------------------------------------------------------------------------- DTensors

HERE, BATCH, HEADS, THIRD, LAST = Replicate(), Shard(0), Shard(1), Shard(2), Shard(3)

SERVED = {
    "replicated": Call([HERE], [HERE], [HERE]),
    "batch": Call([BATCH], [BATCH]),
    "batch_key_mask": Call([BATCH], [BATCH], [BATCH], options=dict(causal=True)),
    "batch_replicated_key_mask": Call([BATCH], [BATCH], [HERE]),
    "batch_dense_mask": Call([BATCH], [BATCH], [BATCH], (4, 1, 5, 7)),
    "batch_mask_of_one_entry": Call([BATCH], [BATCH], [HERE], (1, 4, 5, 7)),
    "batch_shared_heads": Call([BATCH], [BATCH], [BATCH], kv_heads=2),
    "batch_without_kv_heads": Call([BATCH], [BATCH], kv_heads=None),
    "uneven_batch": Call([BATCH], [BATCH], [BATCH], (3, 7), batch=3),
    "one_entry": Call([BATCH], [BATCH], batch=1),
    "heads": Call([HEADS], [HEADS], options=dict(causal=True, scale=0.3)),
    "heads_key_mask": Call([HEADS], [HEADS], [HERE]),
    "heads_shared": Call([HEADS], [HEADS], [HERE], heads=8, kv_heads=2, options=dict(causal=True)),
    "heads_of_the_mask": Call([HEADS], [HEADS], [HEADS], (1, 4, 1, 7)),
    "heads_of_a_replicated_mask": Call([HEADS], [HEADS], [HERE], (1, 4, 5, 7), kv_heads=2),
    "uneven_heads": Call([HEADS], [HEADS], heads=3, kv_heads=3),
    "one_kv_head": Call([HEADS], [HERE], [HERE], kv_heads=1),
    "no_kv_heads": Call([HEADS], [HERE], kv_heads=None, options=dict(causal=True)),
    "heads_of_bias_and_sinks": Call([HEADS], [HEADS], bias=[HEADS], sinks=[Shard(0)], options=dict(window=(3, 2))),
    "batch_of_bias": Call([BATCH], [BATCH], bias=[BATCH], bias_sizes=(4, 1, 5, 7), sinks=[HERE]),
    "shared_bias": Call([BATCH], [BATCH], [BATCH], bias=[HERE], bias_sizes=(4, 5, 7), sinks=[HERE]),
    "positions": Call([THIRD], [THIRD], [HEADS], (4, 6), queries=4, keys=6, options=dict(causal=True, window=(4, 0))),
    "positions_shared_heads": Call([THIRD], [THIRD], [HERE], (4, 6), kv_heads=2, queries=8, keys=6, sinks=[HERE]),
    "positions_without_kv_heads": Call([THIRD], [HEADS], kv_heads=None, queries=6, keys=6),
    "positions_on_one_dimension": Call(
        [HERE, THIRD], [HERE, THIRD], [HERE, LAST], (4, 1, 1, 6), mesh=(1, RANKS), queries=6, keys=6
    ),
    "two_dimensions": Call([BATCH, HEADS], [BATCH, HEADS], [BATCH, HERE], kv_heads=2, mesh=(RANKS, 1)),
    "two_dimensions_of_heads": Call([HEADS, HEADS], [HEADS, HEADS], [HERE, HERE], kv_heads=2, mesh=(1, RANKS)),
}
# Of what ranks share positions of: whether they agree, and positions for heads; nothing that DTensor would gather.
SHARED = {"c10d.allgather_", "c10d_functional.all_to_all_single"}
BACKENDS = (
    pytest.param("cpu", "math", id="math"),
    pytest.param("cuda", "triton", id="triton", marks=pytest.mark.gpu),
)


def put_together(parts: list[torch.Tensor], placements: list) -> torch.Tensor:
    """The whole tensor; of the dimensions of these meshes, one is longer than 1."""
    placement = next((one for one in placements if one != HERE), HERE)
    if isinstance(placement, Shard):
        return torch.cat(parts, dim=placement.dim)
    if isinstance(placement, Partial):
        return sum(parts)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("call", SERVED.values(), ids=SERVED)
def test_sharded_tensors_stay_where_they_are(ranks: Ranks, call: Call, device: str, backend: str) -> None:
    answers = ranks.run(attend, call, device, backend)
    for placements, _, sent in answers:
        assert sent.keys() <= (SHARED if THIRD in call.q else set())
        assert placements["out"] == placements["lse"] == placements["dq"] == call.q
        parts = [Partial() if kv == HERE != q else kv for q, kv in zip(call.q, call.kv, strict=True)]
        assert placements["dk"] == placements["dv"] == parts

    for name, whole in answer(call.tensors(), backend="math", **call.options).items():
        together = put_together([parts[name] for _, parts, _ in answers], answers[0][0][name])
        torch.testing.assert_close(together, whole.detach(), **SAME_SUMS)


COMPILED = {
    "other_heads": (SERVED["batch_key_mask"], SERVED["heads_shared"]),
    "other_placements": (SERVED["batch_key_mask"], SERVED["heads_key_mask"], SERVED["batch_replicated_key_mask"]),
    "positions": (SERVED["positions"],),
    "uneven": (SERVED["uneven_heads"], replace(SERVED["uneven_heads"], heads=9, kv_heads=9), SERVED["uneven_batch"]),
}


def test_an_exchange_for_heads_compiles(ranks: Ranks) -> None:
    ranks.run(compiles, "heads")


@pytest.mark.parametrize("calls", COMPILED.values(), ids=COMPILED)
def test_sharded_tensors_compile(ranks: Ranks, calls: tuple[Call, ...]) -> None:
    """Each in a graph of its own, and from the second on the lengths that differ are symbols."""
    ranks.run(attend_compiled, calls)


REFUSED = {
    "queries": (Call([THIRD], [HERE]), "ValueError: k must be sharded on keys, as q is sharded on queries; .* replic"),
    "odd_queries": (Call([THIRD], [THIRD]), "ValueError: q must have queries that 2 ranks can share evenly, got 5"),
    "odd_keys": (
        Call([THIRD], [THIRD], queries=4),
        "ValueError: k must have keys that 2 ranks can share evenly, got 7",
    ),
    "queries_twice": (
        Call([THIRD, THIRD], [THIRD, THIRD], mesh=(RANKS, 1), queries=4, keys=6),
        "ValueError: q must be replicated or sharded on batch or heads, or once on queries; on dimension 1",
    ),
    "bias_where_queries_are_shared": (
        Call([THIRD], [THIRD], bias=[HERE], bias_sizes=(1, 4, 4, 6), queries=4, keys=6),
        "ValueError: bias must be None where ranks share the sequences",
    ),
    "d": (Call([LAST], [LAST]), r"ValueError: q must be .* it is sharded on d \(S\(3\)\)"),
    "keys": (Call([HERE], [THIRD]), "ValueError: k must be replicated, as q is replicated; .* sharded on keys"),
    "keys_without_heads": (Call([BATCH], [HEADS], kv_heads=None), "ValueError: k must be sharded on batch, .* on keys"),
    "batch_and_heads": (Call([BATCH], [HEADS]), "ValueError: k must be sharded on batch, as q is sharded on batch; .*"),
    "whole_heads": (Call([HEADS], [HERE], kv_heads=2), "ValueError: k must be sharded on heads, as q is .* replicated"),
    "one_head_sharded": (Call([HEADS], [HEADS], kv_heads=1), "ValueError: k must be replicated, .* and k has one head"),
    "odd_heads": (Call([HEADS], [HEADS], heads=6, kv_heads=3), "ValueError: k has 3 heads, which 2 ranks cannot share"),
    "mask_keys": (
        Call([BATCH], [BATCH], [HEADS]),
        "ValueError: mask must be replicated or sharded on batch",
    ),
    "mask_queries": (Call([HERE], [HERE], [THIRD], (4, 1, 5, 7)), "ValueError: mask must be replicated, .* on queries"),
    "mask_of_one_head": (
        Call([HEADS], [HEADS], [HEADS], (4, 1, 5, 7)),
        "ValueError: mask must be replicated, as q",
    ),
    "bias_queries": (
        Call([HEADS], [HEADS], bias=[THIRD]),
        "ValueError: bias must be replicated or sharded on heads, .* on queries",
    ),
    "sinks": (
        Call([BATCH], [BATCH], sinks=[BATCH]),
        "ValueError: alibi_slopes must be replicated|sinks must be replic",
    ),
    "dropout": (Call([BATCH], [BATCH], options=dict(dropout_p=0.1)), "ValueError: dropout_p must be 0 for DTensors"),
    "second_dimension": (
        Call([BATCH, THIRD], [BATCH, HERE], mesh=(RANKS, 1)),
        "k must be sharded on keys, as q is sharded on queries; on dimension 1 of the mesh",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_placement_is_refused(ranks: Ranks, call: Call, message: str) -> None:
    """DTensor would gather what is missing, without a word."""
    for told in ranks.run(refusal, call):
        assert re.search(message, told)


@pytest.mark.parametrize("plain", ("q", "k", "v", "mask"))
def test_plain_tensors_do_not_mix_with_sharded_ones(ranks: Ranks, plain: str) -> None:
    for told in ranks.run(refusal, Call([BATCH], [BATCH], [BATCH]), plain):
        assert told.startswith(f"TypeError: {plain} must be a DTensor")


@pytest.mark.parametrize("cut", ("q", "k", "v", "mask"))
def test_a_part_that_is_not_what_its_placement_says_is_refused(ranks: Ranks, cut: str) -> None:
    for told in ranks.run(refusal, Call([HEADS], [HEADS], [HERE]), "", cut):
        assert told == f"ValueError: {cut} must hold 4 of 4 batch on each rank, got 1"
