"""The algebra in the factors is that of the matrices: each result against a dense computation in float64."""

import numpy as np
import pytest
from updates import made

import loraformat as lf
from loraformat.algebra.factors import lowrank
from loraformat.algebra.lowrank import LowRank, cosine, inner, norm, total
from loraformat.algebra.svd import angles, svd
from loraformat.axes import Placement
from loraformat.blas import one_blas_thread
from loraformat.parts import Lora


@pytest.fixture(autouse=True)
def alone():
    """As the verbs do: on busy cores the threads of BLAS only wait for each other."""
    with one_blas_thread():
        yield


DRAW = np.random.default_rng(11)
LINEAR = Placement((12, 10), (0,), (1,))
CONV = Placement((8, 3, 2, 4), (0,), (1, 2, 3))
EXPERTS = Placement((3, 8, 5), (1,), (2,), (0,))
CASES = [
    *((kind, LINEAR) for kind in ("lora", "delta", "loha", "lokr")),
    *((kind, CONV) for kind in ("tucker", "tucker loha", "tucker lokr")),
    *((kind, EXPERTS) for kind in ("lora", "shared lora", "delta")),
    ("delta", Placement((9,), (0,), ())),
]
BATCHES = [((), ()), ((3,), (3,)), ((1,), (3,)), ((3,), (1,)), ((2, 1), (1, 3)), ((2, 1), (2, 3)), ((1, 1), (1, 1))]


def pair(a=(), b=(), rank=4, out=13, in_=11, seed=None):
    draw = np.random.default_rng(seed) if seed is not None else DRAW
    return LowRank(draw.standard_normal((*a, rank, in_)), draw.standard_normal((*b, out, rank)))


def dense_best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize(("kind", "place"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_the_factors_of_every_kind_give_its_matrix(kind, place):
    update = lf.Update(tuple(p for p in made(kind, place).parts if p.kind != "magnitude"), place)
    m = lowrank(update)
    np.testing.assert_allclose(m.matrix(), update.matrix().reshape(m.shape), rtol=1e-5, atol=1e-5)
    assert norm(m) == pytest.approx(np.linalg.norm(m.matrix()), rel=1e-13)


def test_several_parts_of_an_update_are_one_matrix():
    both = lf.Update((*made("lora", LINEAR).parts, *made("delta", LINEAR).parts))
    np.testing.assert_allclose(lowrank(both).matrix(), both.matrix(), rtol=1e-5, atol=1e-5)


def test_an_update_that_adds_nothing_has_no_matrix():
    with pytest.raises(lf.LoraFormatError, match="LF-612"):
        lowrank(made("replace", LINEAR))


@pytest.mark.parametrize(("a", "b"), BATCHES)
def test_singular_values_and_vectors_are_those_of_the_matrix(a, b):
    m = pair(a, b)
    found = svd(m)
    again = LowRank(found.Vt, found.U * found.s[..., None, :])
    np.testing.assert_allclose(again.matrix(), m.matrix(), atol=1e-12)
    assert np.linalg.norm(found.s) == pytest.approx(np.linalg.norm(m.matrix()), rel=1e-13)
    assert (np.diff(found.s) <= 0).all()
    if a == b:
        np.testing.assert_allclose(found.s, np.linalg.svd(m.matrix(), compute_uv=False)[..., :4], rtol=1e-12)


@pytest.mark.parametrize("shape", [(13, 11), (11, 13), (3, 20), (20, 3), (2, 2), (1, 5)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_nearest_of_a_rank_is_that_of_the_dense_matrix(shape, rank):
    m = pair(rank=4, out=shape[0], in_=shape[1])
    found = svd(m)
    best = dense_best(m.matrix(), rank)
    np.testing.assert_allclose(found.cut(rank).matrix(), best, atol=1e-12)
    wanted = np.linalg.norm(m.matrix() - best) / np.linalg.norm(m.matrix())
    assert found.residual(rank) == pytest.approx(wanted, abs=1e-14)


def test_the_nearest_of_a_batch_is_that_of_each_of_its_matrices():
    m = pair((3,), (3,))
    np.testing.assert_allclose(svd(m).cut(2).matrix(), dense_best(m.matrix(), 2), atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [((1,), (3,)), ((3,), (1,)), ((2, 1), (1, 3))])
def test_a_shared_factor_stays_shared_and_is_the_best_of_its_kind(a, b):
    m = pair(a, b)
    cut = svd(m).cut(2)
    assert (cut.A.shape[:-2], cut.B.shape[:-2]) == (a, b)
    whole = m.matrix()
    order = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x == 1 < y]
    rest = [i for i in range(len(a)) if i not in order]
    tall = whole.transpose(*order, len(a), *rest, len(a) + 1)
    tall = tall.reshape(np.prod(tall.shape[: len(order) + 1]), -1)
    found = cut.matrix().transpose(*order, len(a), *rest, len(a) + 1).reshape(tall.shape)
    np.testing.assert_allclose(found, dense_best(tall, 2), atol=1e-12)


@pytest.mark.parametrize("other", BATCHES[1:4])
def test_sums_and_products_of_pairs_that_share_different_factors(other):
    one, two = pair((3,), (1,)), pair(*other, rank=2)
    whole = 0.5 * one.matrix() - 2 * two.matrix()
    both = total([(0.5, one), (-2.0, two)])
    np.testing.assert_allclose(both.matrix(), whole, atol=1e-12)
    assert norm(both) == pytest.approx(np.linalg.norm(whole), rel=1e-13)
    assert inner(one, two) == pytest.approx(np.sum(one.matrix() * two.matrix()), abs=1e-11)
    wanted = np.sum(one.matrix() * two.matrix()) / np.linalg.norm(one.matrix()) / np.linalg.norm(two.matrix())
    assert cosine(one, two) == pytest.approx(wanted, abs=1e-13)


def test_what_nearly_cancels_keeps_its_digits():
    m = pair(seed=1)
    other = LowRank(m.A, m.B + 1e-9 * pair(seed=2).B)
    wanted = np.linalg.norm((other.B - m.B) @ m.A)
    assert norm(total([(1.0, other), (-1.0, m)])) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e15])
def test_factors_of_any_condition_give_singular_values_to_the_last_digits_of_the_largest(condition):
    m = pair(rank=4, out=40, in_=30, seed=3)
    skewed = LowRank(m.A, m.B * np.geomspace(1, 1 / condition, 4) @ np.linalg.qr(DRAW.standard_normal((4, 4)))[0])
    found = svd(skewed)
    wanted = np.linalg.svd(skewed.matrix(), compute_uv=False)[:4]
    np.testing.assert_allclose(found.s, wanted, atol=1e-13 * wanted[0])
    np.testing.assert_allclose(found.cut(4).matrix(), skewed.matrix(), atol=1e-13 * wanted[0])
    assert np.abs(found.U.T @ found.U - np.eye(4)).max() < 1e-13


def test_the_rank_of_a_sum_that_repeats_itself():
    m = pair(rank=3)
    assert svd(total([(1.0, m), (0.5, m)])).significant == 3
    assert svd(total([(1.0, m), (-1.0, m)])).residual(1) <= 1
    assert svd(m.times(0.0)).significant == 0
    assert svd(m.times(0.0)).residual(1) == 0


@pytest.mark.parametrize("angle", [1e-10, 1e-3, 0.7, 1.5])
def test_principal_angles_are_those_that_the_spaces_were_turned_by(angle):
    basis = np.linalg.qr(DRAW.standard_normal((13, 13)))[0]
    turned = np.cos(angle) * basis[:, :2] + np.sin(angle) * basis[:, 2:4]
    mix = DRAW.standard_normal((2, 2))
    rows = DRAW.standard_normal((2, 9))
    found = angles(LowRank(rows, basis[:, :2] @ mix), LowRank(rows, turned), "out")
    np.testing.assert_allclose(found, [angle, angle], rtol=1e-4, atol=1e-15)
    np.testing.assert_allclose(angles(LowRank(rows, turned), LowRank(mix @ rows, turned), "in"), 0, atol=1e-14)


def test_spaces_of_different_ranks_have_as_many_angles_as_the_smaller():
    assert angles(pair(rank=2), pair(rank=5), "in").shape == (2,)
    assert angles(pair(rank=2), pair(rank=5), "in", rank=1).shape == (1,)


def test_a_pair_of_float32_is_the_matrix_within_its_rounding():
    m = pair()
    part = m.pair()
    assert isinstance(part, Lora)
    assert np.linalg.norm(lf.Update((part,)).matrix() - m.matrix()) < 1e-6 * np.linalg.norm(m.matrix())
