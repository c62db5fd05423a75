"""Laws of the small arithmetic: placements, tiles, products, scales."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loraformat as lf
from loraformat import testing
from loraformat.packed import spread
from loraformat.scale import scale_of

# Placements.


@st.composite
def placements(draw, batch=True):
    """Up to five axes of sizes 1 to 4, each in one list, in any order, at least one out."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    order = draw(st.permutations(range(len(shape))))
    first = draw(st.integers(1, len(order)))
    second = draw(st.integers(first, len(order))) if batch else len(order)
    return lf.Placement(shape, tuple(order[:first]), tuple(order[first:second]), tuple(order[second:]))


def numbered(shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@given(placements())
def test_a_base_tensor_as_a_matrix_and_back_is_itself(place):
    assert place.fault() is None
    base = numbered(place.shape)
    matrix = place.to_matrix(base)
    assert matrix.shape == place.matrix_shape
    assert np.array_equal(place.from_matrix(matrix), base)


@given(placements())
def test_a_matrix_holds_at_each_index_what_the_definition_says(place):
    base, matrix = numbered(place.shape), place.to_matrix(numbered(place.shape))
    for index in np.ndindex(place.shape):
        row, column = (
            int(np.ravel_multi_index([index[a] for a in axes], [place.shape[a] for a in axes])) if axes else 0
            for axes in (place.out, place.in_)
        )
        assert matrix[(*(index[a] for a in place.batch), row, column)] == base[index]


@given(placements())
def test_the_words_of_a_placement_give_it_back(place):
    assert lf.Placement.of(place.shape, place.spec).matrix_shape == place.matrix_shape
    again = lf.Placement.of(place.shape, place.spec)
    assert (again.out, again.in_) == (place.out, place.in_)


@pytest.mark.parametrize(
    ("out", "in_", "batch"),
    [((), (0, 1), ()), ((0,), (), ()), ((0,), (0, 1), ()), ((0,), (2,), ()), ((0,), (1,), (1,))],
)
def test_axes_that_do_not_name_each_axis_once_are_no_placement(out, in_, batch):
    assert lf.Placement((3, 4), out, in_, batch).fault()


# Updates and their tiles.


@given(placements(), st.integers(1, 3), st.integers(0, 2**32), st.data())
def test_runs_of_rows_put_together_are_the_whole(place, rank, seed, data):
    draw = np.random.default_rng(seed)
    *batch, out, in_ = place.matrix_shape
    shared = [data.draw(st.sampled_from([1, n])) for n in batch]
    a, b = draw.standard_normal((*shared, rank, in_)), draw.standard_normal((*batch, out, rank))
    update = lf.Update((lf.Lora(a.astype(np.float32), b.astype(np.float32), 1.7, "alpha/r"),), place)
    base = draw.standard_normal(place.shape).astype(np.float32)
    wanted = np.broadcast_to(1.7 / rank * (b @ a), place.matrix_shape)
    assert testing.relative_error(update.delta(), place.from_matrix(wanted)) <= 1e-5
    inner = data.draw(st.sets(st.sampled_from(range(1, max(2, place.shape[0])))))
    runs = list(itertools.pairwise([0, *sorted(inner - {place.shape[0]}), place.shape[0]]))
    deltas = [update.delta(rows=run) for run in runs]
    np.testing.assert_allclose(np.concatenate(deltas), update.delta(), rtol=1e-5, atol=1e-6)
    applied = [update.apply(base[slice(*run)], run) for run in runs]
    np.testing.assert_allclose(np.concatenate(applied), update.apply(base), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("conv", None), ("embedding", None), ("experts", None), ("delta", None), ("dora", None), ("rows", None), ("replace", (6, 9)), ("lora", (11, 7)), ("loha", (10, 8)), ("lokr", (6, 35))],
)  # fmt: skip
def test_runs_of_rows_of_every_kind_are_the_whole(kind, shape):
    (update,) = testing.random_adapter(seed=3, kinds=[kind]).values()
    if shape:
        update = update.placed(lf.Placement(shape, (0,), (1,)))
    base = np.random.default_rng(4).standard_normal(update.placement.shape).astype(np.float32)
    testing.check_tiles(update, base)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_product_is_taken_in_float32_whatever_the_factors_are_stored_in(dtype):
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal(s).astype(dtype) for s in ((64, 40), (30, 64)))
    update = lf.Update((lf.Lora(a, b, 64, "alpha/r"),))
    assert update.matrix().dtype == np.float32
    assert testing.relative_error(update.matrix(), b.astype(np.float64) @ a.astype(np.float64)) <= 1e-6


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.floats(-9, 9), st.integers(0, 2**32))
def test_the_norm_by_the_factors_is_the_norm_of_the_matrix(rank, out, in_, alpha, seed):
    draw = np.random.default_rng(seed)
    a, b = (draw.standard_normal(s).astype(np.float32) for s in ((rank, in_), (out, rank)))
    update = lf.Update((lf.Lora(a, b, alpha, "alpha/sqrt(r)"),))
    assert update.norm() == pytest.approx(np.linalg.norm(update.matrix().astype(np.float64)), rel=1e-5, abs=1e-9)


# Scales.


@given(st.floats(-1e9, 1e9), st.integers(1, 4096))
def test_the_scale_rules_are_their_formulas(alpha, r):
    assert scale_of(alpha, "factor", r) == alpha
    assert scale_of(alpha, "factor", None) == alpha
    assert scale_of(alpha, "alpha/r", r) == alpha / r
    assert scale_of(alpha, "alpha/sqrt(r)", r) == alpha / math.sqrt(r)


@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("r", [None, 0, -1])
def test_a_rule_that_divides_by_the_rank_needs_one(rule, r):
    with pytest.raises(ValueError, match="needs a rank"):
        scale_of(1.0, rule, r)


@pytest.mark.parametrize("spec", ["out,in", "in,out"])
def test_a_magnitude_of_some_rows_leaves_the_others_as_they_are(spec):
    """Bit for bit, infinite and zero ones too, which have no direction; whole, and in runs of rows."""
    draw = np.random.default_rng(4)
    matrix = draw.standard_normal((9, 5)).astype(np.float32)
    matrix[0], matrix[8, 2] = 0, np.inf
    pair = lf.Lora(*(draw.standard_normal(s).astype(np.float32) for s in ((2, 5), (4, 2))), 0.5, "factor")
    length = lf.Magnitude(draw.uniform(1, 2, 4).astype(np.float32), eps=1e-6)
    for first in ((pair,), (pair, lf.Delta(draw.standard_normal((4, 5)).astype(np.float32)))):
        own = lf.Update((*first, length), lf.Placement.of((4, 5), "out,in"))
        wanted = matrix.copy()
        wanted[3:7] = own.apply(matrix[3:7])
        place = lf.Placement.of((9, 5) if spec == "out,in" else (5, 9), spec)
        whole = spread(own, (3, 7), 9).placed(place)
        base = place.from_matrix(matrix)
        found = whole.apply(base)
        np.testing.assert_allclose(place.to_matrix(found), wanted, rtol=1e-6)
        for rows in (slice(0, 3), slice(7, 9)):
            assert place.to_matrix(found)[rows].tobytes() == matrix[rows].tobytes()
        if spec == "out,in":
            runs = [whole.apply(base[a : a + 2], (a, min(9, a + 2))) for a in range(0, 9, 2)]
            assert np.concatenate(runs).tobytes() == found.tobytes()
        np.testing.assert_allclose(whole.norms(base)[3:7], own.norms(matrix[3:7]), rtol=1e-6)


def test_a_magnitude_of_other_axes_is_of_no_rows():
    pair = lf.Lora(np.ones((1, 5), np.float32), np.ones((4, 1), np.float32), 1.0, "factor")
    columns = lf.Magnitude(np.ones(5, np.float32), magnitude_axes=(1,))
    with pytest.raises(lf.LoraFormatError, match=r"LF-612.*no sum"):
        spread(lf.Update((pair, columns), lf.Placement.of((4, 5), "out,in")), (3, 7), 9)
