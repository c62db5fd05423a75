"""Values are looked at one by one: what is not finite, and what is all zero."""

import ml_dtypes
import numpy as np
import pytest

from loraformat import testing, values
from loraformat.parts import roles_of
from loraformat.values import finite_and_zero

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 777, 1_100_002, -1])
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(dtype, place):
    values = np.random.default_rng(0).uniform(-1, 1, 1_100_003).astype(np.float32).astype(dtype)
    assert finite_and_zero(values) == (True, False)
    for sick in (np.nan, -np.nan, np.inf, -np.inf):
        with np.errstate(invalid="ignore"):
            values[place] = dtype(sick)
        assert finite_and_zero(values) == (np.isfinite(values.astype(np.float64)).all(), False)
        assert not finite_and_zero(values)[0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_values_of_both_signs_are_finite(dtype):
    limits = ml_dtypes.finfo(dtype)
    for some in ([limits.max], [limits.min], [limits.max, limits.min, limits.smallest_subnormal]):
        assert finite_and_zero(np.array(some * 9, dtype)) == (dtype is not np.float64, False)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_double_is_finite_as_far_as_float32_goes(sign):
    most = np.float64(np.finfo(np.float32).max) * sign
    assert finite_and_zero(np.array([0, most])) == (True, False)
    assert finite_and_zero(np.array([0, np.nextafter(most, np.inf * sign)])) == (False, False)


def test_many_tensors_are_read_by_two_threads_and_told_in_order(monkeypatch):
    monkeypatch.setattr(values, "_LARGE", 1000)
    adapter = testing.random_adapter(kinds=["lora", "conv", "dora", "loha", "replace", "rows", "experts"])
    tensors = [t for u in adapter.values() for part in u.parts for _, t in roles_of(part) if t.dtype == np.float32]
    for tensor in tensors[2::3]:
        tensor.flat[-1] = np.nan
    found = [problem.where for problem in values.value_problems(adapter)]
    monkeypatch.undo()
    assert len(found) == len(tensors[2::3])
    assert found == [problem.where for problem in values.value_problems(adapter)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_zeros_of_both_signs_are_zero_and_the_smallest_value_is_not(dtype, sign):
    values = (np.zeros(5, np.float32) * sign).astype(dtype)
    assert finite_and_zero(values) == (True, True)
    values[3] = sign * ml_dtypes.finfo(dtype).smallest_subnormal
    assert finite_and_zero(values) == (True, False)


def test_values_of_another_byte_order_and_of_strided_tensors_are_read_as_they_are():
    values = np.ones((6, 8), ">f4")
    values[5, 6] = np.nan
    assert finite_and_zero(values) == (False, False)
    assert finite_and_zero(values[:, ::4]) == (True, False)
    assert finite_and_zero(values.T[6:]) == (False, False)
