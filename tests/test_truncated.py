"""The leading singular values of a dense matrix, without the others: what a full decomposition has."""

import numpy as np
import pytest

from loraformat.algebra import truncated as module
from loraformat.algebra.truncated import truncated
from loraformat.blas import one_blas_thread


@pytest.fixture(autouse=True)
def alone():
    """As the verbs do: on busy cores the threads of BLAS only wait for each other."""
    with one_blas_thread():
        yield


DRAW = np.random.default_rng(5)


def product(out, in_, rank):
    return DRAW.standard_normal((out, rank)) @ DRAW.standard_normal((rank, in_))


def halved(out, in_, rank):
    """A product with half of its entries gone: few large singular values, and a tail that hardly decays."""
    return product(out, in_, rank) * (DRAW.random((out, in_)) < 0.5)


MATRICES = {
    "no decay": lambda: DRAW.standard_normal((410, 300)),
    "slow decay": lambda: halved(310, 420, 12),
    "the cut among equals": lambda: halved(420, 310, 8),
    "of lower rank": lambda: product(330, 320, 3),
    "one direction": lambda: product(320, 330, 1),
    "small": lambda: DRAW.standard_normal((20, 30)),
    "huge numbers": lambda: 1e20 * halved(310, 420, 12),
    "tiny numbers": lambda: 1e-25 * halved(310, 420, 12),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 6])
def test_what_is_lost_is_the_least_that_can_be(name, rank):
    matrix = MATRICES[name]().astype(np.float32)
    found, residual = truncated(matrix, rank)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best = np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))
    cut = found.cut(rank).matrix()
    true = np.linalg.norm(matrix.astype(np.float64) - cut) / np.linalg.norm(matrix.astype(np.float64))
    assert residual == pytest.approx(true, rel=1e-6, abs=1e-8)
    assert best - 1e-9 <= true <= best * (1 + 1e-6) + 1e-7
    np.testing.assert_allclose(found.s, values[:rank], rtol=1e-4, atol=1e-6 * values[0])


def test_the_large_ones_are_not_decomposed_whole(monkeypatch):
    whole = np.linalg.svd
    monkeypatch.setattr(module.np.linalg, "svd", lambda m, **how: whole(m, **how) if min(m.shape) < 300 else None)
    assert truncated(halved(310, 420, 12).astype(np.float32), 6)[1] > 0.1


def test_a_batch_is_cut_matrix_by_matrix():
    batch = DRAW.standard_normal((2, 3, 9, 7)).astype(np.float32)
    found, residual = truncated(batch, 2)
    assert found.U.shape == (2, 3, 9, 2)
    cut = found.cut(2).matrix()
    assert np.linalg.norm(batch - cut) / np.linalg.norm(batch) == pytest.approx(residual, rel=1e-6)
    assert np.linalg.matrix_rank(cut[1, 2]) == 2


def test_nothing_is_nearest_to_nothing():
    found, residual = truncated(np.zeros((300, 310), np.float32), 4)
    assert residual == 0
    assert not found.cut(4).matrix().any()


def test_the_same_matrix_gives_the_same_bits():
    matrix = halved(310, 420, 12).astype(np.float32)
    one, other = truncated(matrix, 6), truncated(matrix, 6)
    assert all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))
