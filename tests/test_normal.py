"""The generator of fresh adapters: the same numbers forever, and normal ones."""

import hashlib
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.normal import normal, uniform


def test_the_bits_are_those_of_shake_128_and_nothing_else():
    stream = hashlib.shake_128(b"loraformat/1\n42\nmodel.q.weight").digest(80)
    wanted = [(int.from_bytes(stream[i : i + 8], "little") >> 11) + 0.5 for i in range(0, 80, 8)]
    assert uniform(42, "model.q.weight", 10).tolist() == [x / 2**53 for x in wanted]


def test_the_numbers_of_a_seed_are_these_forever():
    assert hashlib.sha256(normal(42, "model.q.weight", 1000).astype("<f8").tobytes()).hexdigest() == NORMAL
    assert hashlib.sha256(uniform(42, "model.q.weight", 1000).astype("<f8").tobytes()).hexdigest() == UNIFORM


NORMAL = "2e52bbddf3d6a1f1950c5d79b974d499fd3d103e6305ad9fe48131fe65e81dd3"
UNIFORM = "163bc38ab7e4981b4d0ec1cbff5e3f8e10c1d1a4e66626ed9b533854076d259f"


def test_a_seed_and_a_name_each_give_other_numbers_and_a_count_only_more_of_them():
    whole = normal(0, "a", 1000)
    assert np.array_equal(normal(0, "a", 10), whole[:10])
    assert not np.intersect1d(whole, normal(1, "a", 1000)).size
    assert not np.intersect1d(whole, normal(0, "b", 1000)).size


# p and the quantile of the standard normal distribution, to 17 digits (Wichura 1988 prints the first three).
QUANTILES = {
    0.25: -0.67448975019608171,
    0.001: -3.0902323061678133,
    1e-20: -9.2623400897984076,
    0.5: 0.0,
    0.975: 1.9599639845400539,
    0.9: 1.2815515655446004,
    1e-5: -4.2648907939228246,
    1e-10: -6.3613409024040557,
    2.0**-54: -8.2923610758135955,
}


@pytest.mark.parametrize("p", QUANTILES)
def test_the_inverse_distribution_function_has_its_known_values(p, monkeypatch):
    monkeypatch.setattr("loraformat.normal.uniform", lambda seed, name, count: np.full(count, p))
    assert normal(0, "", 1)[0] == pytest.approx(QUANTILES[p], rel=2e-15, abs=1e-16)


@given(st.floats(1e-16, 1 - 1e-16))
def test_the_inverse_distribution_function_is_that_of_the_standard_library(p):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraformat.normal.uniform", lambda seed, name, count: np.full(count, p))
        found = normal(0, "", 1)[0]
    assert found == pytest.approx(statistics.NormalDist().inv_cdf(p), rel=1e-13, abs=1e-15)


def test_the_numbers_are_normal():
    numbers = normal(7, "moments", 1_000_000)
    assert numbers.mean() == pytest.approx(0, abs=5e-3)
    assert numbers.var() == pytest.approx(1, abs=7e-3)
    assert (numbers**3).mean() == pytest.approx(0, abs=0.02)
    assert (numbers**4).mean() == pytest.approx(3, abs=0.05)
    assert np.corrcoef(numbers[:-1], numbers[1:])[0, 1] == pytest.approx(0, abs=5e-3)
    for quantile in (0.01, 0.25, 0.5, 0.9):
        assert np.mean(numbers < statistics.NormalDist().inv_cdf(quantile)) == pytest.approx(quantile, abs=2.5e-3)


def test_the_uniform_numbers_lie_strictly_within_zero_and_one():
    numbers = uniform(7, "moments", 1_000_000)
    assert 0 < numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(100_000, rel=0.02)
