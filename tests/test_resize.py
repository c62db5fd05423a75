"""Fewer ranks for the same change: the nearest there is, what is lost is said, and what has no rank stays."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from combined import adapter, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import made

import loraformat as lf
from loraformat import testing
from loraformat.axes import Placement
from loraformat.parts import Lora
from loraformat.testing import relative_error

KINDS = ("lora", "conv", "embedding", "experts", "dora", "loha", "lokr", "delta", "replace", "rows")


def decaying(seed, out=30, in_=20, rank=8, key="a.weight", scale=1.0):
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((rank, in_)) * scale * 0.5 ** np.arange(rank)[:, None]
    return {
        key: lf.Update(
            (Lora(a.astype(np.float32), draw.standard_normal((out, rank)).astype(np.float32), 1.0, "factor"),)
        )
    }


MIXED = lf.Adapter(
    {**decaying(1), **decaying(2, 25, 22, 6, "b.weight", 0.01), **decaying(3, 12, 31, 5, "c.weight", 3.0)}
)


def values(adapter):
    return {key: np.linalg.svd(dense(adapter, key), compute_uv=False)[: u.rank] for key, u in adapter.items()}


def distance(one, other):
    """(by target, of all) ‖ΔW' − ΔW‖ / ‖ΔW‖, dense in float64."""
    gone = {key: np.linalg.norm(dense(other, key) - dense(one, key)) for key in one}
    whole = {key: np.linalg.norm(dense(one, key)) for key in one}
    return {k: gone[k] / whole[k] for k in one}, math.hypot(*gone.values()) / math.hypot(*whole.values())


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_result_is_the_nearest_of_the_rank(rank):
    done = lf.resize(MIXED, rank=rank)
    each, whole = distance(MIXED, done.adapter)
    for key, s in values(MIXED).items():
        assert done.adapter[key].rank == min(rank, len(s))
        assert each[key] == pytest.approx(np.linalg.norm(s[rank:]) / np.linalg.norm(s), abs=1e-6)
        assert done.residuals[key] == pytest.approx(each[key], abs=1e-9)
        assert done.ranks[key] == (len(s), min(rank, len(s)))
    assert done.residual == pytest.approx(whole, abs=1e-9)


def test_a_pair_that_has_no_more_stays_byte_for_byte():
    done = lf.resize(MIXED, rank=6)
    assert done.adapter["b.weight"] is MIXED["b.weight"]
    assert done.residuals["b.weight"] == 0.0
    assert done.adapter["a.weight"]["lora"].scale_rule == "factor"


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("per_target", [False, True])
def test_the_fewest_ranks_that_keep_the_energy(energy, per_target):
    done = lf.resize(MIXED, energy=energy, per_target=per_target)
    each, whole = distance(MIXED, done.adapter)
    kept = {key: 1 - share**2 for key, share in each.items()} if per_target else {"all": 1 - whole**2}
    assert min(kept.values()) >= energy - 1e-6
    squares = {key: s**2 for key, s in values(MIXED).items()}
    total = sum(s.sum() for s in squares.values())
    ranks = {key: after for key, (_, after) in done.ranks.items()}
    removable = [key for key, r in ranks.items() if r > 1]
    for key in removable:  # one rank fewer anywhere would be too few
        less = ranks | {key: ranks[key] - 1}
        left = {k: s[: less[k]].sum() for k, s in squares.items()}
        assert left[key] / squares[key].sum() < energy if per_target else sum(left.values()) / total < energy


def test_over_all_targets_the_strongest_ranks_stay():
    done = lf.resize(MIXED, energy=0.9)
    squares = {key: s**2 for key, s in values(MIXED).items()}
    weakest = min(squares[k][r - 1] for k, (_, r) in done.ranks.items() if r > 1)
    strongest = max(squares[k][r] for k, (_, r) in done.ranks.items() if r < len(squares[k]))
    assert weakest >= strongest
    assert done.ranks["b.weight"][1] == 1


@pytest.mark.parametrize("residual", [0.5, 0.1, 1e-3, 0.0])
@pytest.mark.parametrize("per_target", [False, True])
def test_no_more_is_lost_than_the_residual(residual, per_target):
    done = lf.resize(MIXED, residual=residual, per_target=per_target)
    each, whole = distance(MIXED, done.adapter)
    assert (max(each.values()) if per_target else whole) <= residual + 1e-6
    assert (
        sum(after for _, after in done.ranks.values()) < sum(before for before, _ in done.ranks.values())
        or residual < 0.1
    )


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(max_examples=20)
def test_more_ranks_lose_less_and_resizing_twice_is_resizing_once(seed, rank):
    source = adapter(seed, 6)
    less, more = (lf.resize(source, rank=r) for r in (rank, rank + 1))
    again = lf.resize(less.adapter, rank=rank)
    for key in source:
        assert less.residuals[key] >= more.residuals[key] - 1e-6
        assert relative_error(again.adapter[key].matrix(), less.adapter[key].matrix()) < 1e-6


def test_every_kind_with_a_rank_is_resized_and_the_others_stay():
    source = testing.random_adapter(4, KINDS)
    done = lf.resize(source, rank=1)
    assert set(done.untouched) == {"norm.bias", "head.weight", "tokens.weight"}
    for key, update in done.adapter.items():
        if key in done.untouched:
            assert update is source[key]
            continue
        assert update.rank == 1
        matrix = source[key].matrix().astype(np.float64)
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        best = (u[..., :1] * s[..., None, :1]) @ vt[..., :1, :]
        assert relative_error(update.matrix(), best) < 1e-5
        assert update.placement == source[key].placement
    assert done.adapter["blocks.2.dora.weight"]["magnitude"] is source["blocks.2.dora.weight"]["magnitude"]


@pytest.mark.parametrize("kind", ["tucker", "tucker loha", "tucker lokr"])
def test_cores_become_plain_pairs(kind):
    place = Placement((8, 3, 2, 4), (0,), (1, 2, 3))
    source = lf.Adapter({"a.weight": lf.Update(tuple(made(kind, place).parts), place)})
    update = lf.resize(source, rank=2).adapter["a.weight"]
    assert (update.kind, update.rank, update["lora"].mid) == ("lora", 2, None)


def test_a_batch_that_shares_a_factor_counts_as_often_as_the_base_has_it():
    draw = np.random.default_rng(2)
    place = Placement((3, 5, 8), (1,), (2,), (0,))
    pair = Lora(
        draw.standard_normal((1, 4, 8)).astype(np.float32),
        draw.standard_normal((3, 5, 4)).astype(np.float32),
        1.0,
        "factor",
    )
    alone = Lora(pair.lora_A, pair.lora_B[:1], 1.0, "factor")
    for part in (pair, alone):
        source = lf.Adapter({"a": lf.Update((part,), place), **decaying(1)})
        done = lf.resize(source, rank=2)
        cut = done.adapter["a"]["lora"]
        assert (cut.lora_A.shape, cut.lora_B.shape) == ((1, 2, 8), (*part.lora_B.shape[:-1], 2))
        deltas = [
            [place.from_matrix(a["a"].matrix()).astype(float), dense(a, "a.weight")] for a in (source, done.adapter)
        ]
        gone = math.hypot(*(np.linalg.norm(x - y) for x, y in zip(*deltas, strict=True)))
        assert done.residual == pytest.approx(gone / math.hypot(*map(np.linalg.norm, deltas[0])), abs=1e-6)


def test_16_bits_are_computed_in_64_and_stored_in_32():
    source = adapter(7, 6, dtype=ml_dtypes.bfloat16)
    done = lf.resize(source, rank=3)
    assert {u["lora"].lora_A.dtype for u in done.adapter.values()} == {np.dtype(np.float32)}
    s = np.linalg.svd(dense(source, "a.weight"), compute_uv=False)
    assert done.residuals["a.weight"] == pytest.approx(np.linalg.norm(s[3:]) / np.linalg.norm(s), abs=1e-6)


def test_what_changes_nothing_has_rank_one():
    zero = replace(MIXED, targets={k: lf.Update((replace(u["lora"], alpha=0.0),)) for k, u in MIXED.items()})
    done = lf.resize(zero, energy=0.9)
    assert {after for _, after in done.ranks.values()} == {1}
    assert done.residual == 0.0


def test_the_file_says_what_it_was_made_of():
    said = lf.resize(MIXED, residual=0.1).adapter.provenance["resized"]
    assert said["residual"] == 0.1
    assert said["from"] == lf.digest(MIXED)
    assert said["residuals"].keys() == MIXED.keys()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rank": 2, "energy": 0.5},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.1},
        {"residual": 1.0},
        {"residual": -0.1},
        {"rank": 2, "per_target": True},
        {"energy": math.nan},
    ],
)
def test_what_cannot_be_asked_is_refused(how):
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.resize(MIXED, **how)


def test_an_adapter_without_ranks_is_refused():
    with pytest.raises(lf.LoraFormatError, match="LF-612"):
        lf.resize(testing.random_adapter(1, ("delta", "replace")), rank=2)
