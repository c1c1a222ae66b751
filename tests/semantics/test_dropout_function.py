"""The keep mask: its generator against published vectors, its positions, its statistics."""

import math
from dataclasses import replace

import pytest
import torch

from flash_attend import dropout, dropout_cpu
from flash_attend.dropout import ROUNDS, draw_seed, keep_mask, keep_threshold, philox
from flash_attend.spec import AttentionSpec

WORD = 2**32 - 1
CPU = torch.device("cpu")

# Random123, examples/kat_vectors, philox4x32 10: counter, key, output
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter, key, rounds):
    """Philox4x32 as the paper writes it, on Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def plain_keep(seed, p, batch, head, query, key):
    """The definition of the keep function, one element at a time."""
    words = plain_philox((query & ~8, key & ~8, head, batch), (seed % 2**32, seed >> 32), 7)
    return words[2 * (query >> 3 & 1) + (key >> 3 & 1)] >= min(round(p * 2**32), WORD)


def make_seed(value):
    return torch.tensor([value], dtype=torch.int64)


def make_spec(batch=1, heads=1, queries=64, keys=64, p=0.3):
    return AttentionSpec(batch, heads, heads, queries, keys, 8, 8, torch.float32, dropout_p=p)


def test_the_plain_generator_gives_the_published_words():
    for counter, key, words in KNOWN_ANSWERS:
        assert plain_philox(counter, key, 10) == words


@pytest.mark.parametrize("rounds", [ROUNDS, 10])
def test_the_tensor_generator_equals_the_plain_one(rounds, monkeypatch):
    monkeypatch.setattr(dropout, "ROUNDS", rounds)
    torch.manual_seed(0)
    counters = torch.randint(0, 2**32, (200, 4))
    counters = torch.cat([counters, torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS])])
    for seed in (0, 7, 2**40 + 7, 2**63 - 1):
        words = torch.stack(philox(make_seed(seed), counters.unbind(1)), dim=1)
        expected = [plain_philox(counter, (seed % 2**32, seed >> 32), rounds) for counter in counters.tolist()]
        assert words.tolist() == [list(row) for row in expected]


@pytest.mark.parametrize("on_cpu", [True, False], ids=("numpy", "torch"))
@pytest.mark.parametrize("seed", [3, 2**33 + 3, 2**63 - 1])
def test_the_mask_equals_the_definition(seed, on_cpu, monkeypatch):
    monkeypatch.setattr(dropout, "readable", lambda *tensors: on_cpu)
    spec = make_spec(batch=2, heads=3, queries=23, keys=37)
    mask = keep_mask(make_seed(seed), spec, 0, 23)
    assert mask.shape == (2, 3, 23, 37) and mask.dtype == torch.bool
    for batch, head, query, key in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        assert mask[batch, head, query, key] == plain_keep(seed, 0.3, batch, head, query, key)


@pytest.mark.parametrize("on_cpu", [True, False], ids=("numpy", "torch"))
@pytest.mark.parametrize("piece", [1, 500, 2**40])
def test_neither_the_range_nor_the_piece_changes_what_is_kept(piece, on_cpu, monkeypatch):
    spec = make_spec(batch=2, heads=2, queries=75, keys=45)
    seed = make_seed(11)
    whole = keep_mask(seed, spec, 0, 75)
    monkeypatch.setattr(dropout, "readable", lambda *tensors: on_cpu)
    monkeypatch.setattr(dropout, "LARGEST_PIECE", piece)
    monkeypatch.setattr(dropout_cpu, "PIECE", piece)
    for first, last in ((0, 75), (0, 1), (5, 6), (7, 40), (16, 48), (31, 75), (33, 33), (0, 0)):
        assert torch.equal(keep_mask(seed, spec, first, last), whole[:, :, first:last])
        for keys in (0, 1, 15, 16, 44):
            assert torch.equal(keep_mask(seed, spec, first, last, keys), whole[:, :, first:last, :keys])


@pytest.mark.parametrize("origin", [(0, 0), (16, 5), (37, 24), (61, 30)])
def test_a_part_of_longer_sequences_keeps_what_the_whole_does(origin):
    seed, (query, key) = make_seed(11), origin
    whole = keep_mask(seed, make_spec(batch=2, heads=2, queries=75, keys=45), 0, 75)
    part = replace(make_spec(batch=2, heads=2, queries=75 - query, keys=45 - key), origin=origin)
    for first, last in ((0, 14), (3, 10), (8, 9)):
        found = keep_mask(seed, part, first, last, 14)
        assert torch.equal(found, whole[:, :, query + first : query + last, key : key + 14])


@pytest.mark.parametrize("origin", [None, (37, 24)])
@pytest.mark.parametrize("piece", [1, 3000, 2**40])
@pytest.mark.parametrize(
    ("causal", "left", "right"), [(True, None, None), (True, 20, None), (False, 0, 3), (False, None, 17)]
)
def test_what_is_kept_of_visible_weights_is_what_a_call_keeps_that_hides_nothing(
    causal, left, right, piece, origin, monkeypatch
):
    """On a CPU little is computed of the others."""
    monkeypatch.setattr(dropout_cpu, "PIECE", piece)
    seed = make_seed(11)
    for queries, keys in ((75, 45), (45, 75), (60, 60)):
        plain = replace(make_spec(batch=2, heads=2, queries=queries, keys=keys), origin=origin)
        ahead = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
        visible = ahead <= (0 if causal else keys if right is None else right)
        visible &= ahead >= (-keys - queries if left is None else -left)
        for first, last in ((0, queries), (7, 40)):
            found = keep_mask(seed, replace(plain, causal=causal, window=(left, right)), first, last)
            assert torch.equal(found & visible[first:last], keep_mask(seed, plain, first, last) & visible[first:last])


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0)])
def test_an_empty_call_has_an_empty_mask(batch, heads):
    assert keep_mask(make_seed(1), make_spec(batch, heads), 0, 64).shape == (batch, heads, 64, 64)


def test_far_positions_follow_the_definition():
    first = 2**31 - 4096 - 20
    mask = keep_mask(make_seed(5), make_spec(keys=20), first, first + 20)
    for query in range(20):
        for key in range(20):
            assert mask[0, 0, query, key] == plain_keep(5, 0.3, 0, 0, first + query, key)


def agreement_deviation(one, other, p):
    """How many standard deviations the agreement of two masks lies from that of independent ones."""
    chance = p * p + (1 - p) * (1 - p)
    return ((one == other).double().mean().item() - chance) / math.sqrt(chance * (1 - chance) / one.numel())


def test_far_queries_do_not_alias_near_ones():
    keys = 2**16  # query 2**16 is element 2**32 of a head: a 32-bit element index would be back at the first query
    spec = make_spec(keys=keys)
    near = keep_mask(make_seed(5), spec, 0, 16, 2**12)
    for far in (2**15, 2**16, 2**16 + 8, 2**24, 2**30):
        assert abs(agreement_deviation(near, keep_mask(make_seed(5), spec, far, far + 16, 2**12), 0.3)) < 5


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_the_share_kept_is_that_asked_for(p):
    spec = make_spec(batch=2, heads=4, queries=256, keys=512, p=p)
    kept = keep_mask(make_seed(2024), spec, 0, 256).double()
    every = set(range(4))
    # whole mask, then every batch, head, query and key for itself: 776 shares, so that 5.5 deviations are one in 3e4
    for left in (set(), {0}, {1}, {2}, {3}):
        share = kept.mean(dim=tuple(every - left))
        deviation = (share - (1 - p)).abs() / math.sqrt(p * (1 - p) * share.numel() / kept.numel())
        assert deviation.max() < 5.5


def test_batches_heads_seeds_and_neighbours_are_independent():
    p = 0.5  # where the agreements of overlapping pairs are independent of one another too
    spec = make_spec(batch=2, heads=3, queries=256, keys=256, p=p)
    kept = keep_mask(make_seed(99), spec, 0, 256)
    below = torch.ones(256, 256, dtype=torch.bool).tril(-1)
    pairs = [(kept[0], kept[1])]
    pairs += [(kept[:, 0], kept[:, 1]), (kept[:, 0], kept[:, 2]), (kept[:, 1], kept[:, 2])]
    pairs += [(kept, keep_mask(make_seed(seed), spec, 0, 256)) for seed in (98, 100, 99 + 2**32, 99 + 2**62)]
    pairs += [(kept[..., shift:], kept[..., :-shift]) for shift in (1, 7, 8, 9, 16)]
    pairs += [(kept[..., shift:, :], kept[..., :-shift, :]) for shift in (1, 7, 8, 9, 16)]
    pairs += [(kept[..., 8:, 8:], kept[..., :-8, :-8]), (kept[..., below], kept.transpose(-1, -2)[..., below])]
    for one, other in pairs:
        assert abs(agreement_deviation(one, other, p)) < 5


def test_the_threshold():
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(0.1) == round(0.1 * 2**32)
    assert keep_threshold(1 - 2**-53) == WORD
    assert keep_mask(make_seed(1), make_spec(p=0.0), 0, 64).all()
    word, *_ = plain_philox((0, 0, 0, 0), (1, 0), ROUNDS)  # an element whose word is the threshold is kept
    kept = [keep_mask(make_seed(1), make_spec(p=(word + more) / 2**32), 0, 1)[0, 0, 0, 0] for more in (-1, 0, 1)]
    assert kept == [True, True, False]


def test_the_seed_comes_from_torch_s_generator():
    torch.manual_seed(1)
    seeds = [draw_seed(CPU) for _ in range(20)]
    assert all(seed.shape == (1,) and seed.dtype == torch.int64 and seed.device == CPU for seed in seeds)
    values = [seed.item() for seed in seeds]
    assert len(set(values)) == 20 and min(values) >= 0 and max(values) > 2**32
    torch.manual_seed(1)
    assert [draw_seed(CPU).item() for _ in range(20)] == values


def test_nothing_is_read_on_the_host():
    seed = draw_seed(torch.device("meta"))  # a tensor without data: reading it would raise
    assert keep_mask(seed, make_spec(batch=2, heads=3), 5, 50).shape == (2, 3, 45, 64)
