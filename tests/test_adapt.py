"""Other forms of the same change, as asked: what stays exact, what is lost and said, what is refused."""

import ml_dtypes
import numpy as np
import pytest

import loraformat as lf
from loraformat import testing
from loraformat.errors import LoraFormatError
from loraformat.parts import Delta, Lora
from loraformat.testing import relative_error
from loraformat.verbs.adapt import adapt

DRAW = np.random.default_rng(3)


def normal(*shape, dtype=np.float32):
    return DRAW.standard_normal(shape).astype(dtype)


def pair(out, in_, rank, alpha=5.0, rule="alpha/r", dtype=np.float32):
    return Lora(normal(rank, in_, dtype=dtype), normal(out, rank, dtype=dtype), alpha, rule)


def mixed():
    return testing.random_adapter(8, ("lora", "loha", "lokr", "dora", "delta"))


def matrices(adapter):
    return {key: update.matrix() for key, update in adapter.items() if update.additive}


@pytest.mark.parametrize("ways", [{"fold_scale": True}, {"pad_rank": True}, {"fold_scale": True, "pad_rank": True}])
def test_what_is_exact_keeps_every_matrix(ways):
    adapter = mixed()
    adapted = adapt(adapter, **ways)
    for key, matrix in matrices(adapter).items():
        assert relative_error(adapted.adapter[key].matrix(), matrix) < 1e-6
    assert all(error < 1e-7 for error in adapted.residuals.values())


def test_a_folded_scale_is_one_everywhere_and_a_padded_rank_the_same():
    adapted = adapt(mixed(), fold_scale=True, pad_rank=True).adapter
    assert {part.scale for update in adapted.values() for part in update.additive} == {1.0}
    assert len({update["lora"].r for update in adapted.values() if "lora" in update}) == 1


def test_a_scale_folded_into_16_bits_says_what_the_rounding_cost():
    part = pair(7, 5, 3, alpha=4.1, dtype=np.float16)
    adapter = lf.Adapter({"a.weight": lf.Update((part,))})
    (residual,) = adapt(adapter, fold_scale=True).residuals.values()
    assert 0 < residual < 1e-3
    assert adapt(adapter, dtype="float32", fold_scale=True).residuals["a.weight"] < 1e-7


def test_the_nearest_pair_has_the_residual_of_the_singular_values_left_out():
    part = Delta(normal(9, 6), 0.7, "factor")
    adapted = adapt(lf.Adapter({"a.weight": lf.Update((part,))}), to_lora=2)
    values = np.linalg.svd(part.delta.astype(np.float64), compute_uv=False)
    best = np.sqrt(np.sum(values[2:] ** 2) / np.sum(values**2))
    assert adapted.adapter["a.weight"].kind == "lora"
    assert adapted.adapter["a.weight"].rank == 2
    assert adapted.residuals["a.weight"] == pytest.approx(best, rel=1e-5)
    found = relative_error(adapted.adapter["a.weight"].matrix(), 0.7 * part.delta)
    assert found == pytest.approx(best, rel=1e-5)


def test_what_is_dropped_is_named_and_what_is_left_is_as_it_was():
    adapter = testing.random_adapter(8, ("lora", "dora"))
    adapted = adapt(adapter, drop=("magnitude",))
    assert sorted(adapted.dropped) == sorted(f"{k}: magnitude" for k, u in adapter.items() if "magnitude" in u)
    assert lf.digest(adapted.adapter) != lf.digest(adapter)
    assert all(np.array_equal(matrices(adapted.adapter)[k], m) for k, m in matrices(adapter).items())


@pytest.mark.parametrize(
    ("ways", "rule"),
    [
        ({"drop": ("lora", "loha", "lokr", "delta", "magnitude")}, "LF-705"),
        ({"drop": ("dora",)}, "LF-705"),
        ({"to_lora": 0}, "LF-705"),
        ({"dtype": "int8"}, "LF-705"),
    ],
)
def test_what_means_nothing_is_refused(ways, rule):
    with pytest.raises(LoraFormatError, match=rule):
        adapt(mixed(), **ways)


@pytest.mark.parametrize("ways", [{"fold_scale": True}, {"dtype": "float16"}])
def test_a_value_beyond_the_dtype_is_refused(ways):
    big = Lora(normal(3, 5, dtype=ml_dtypes.bfloat16), np.full((7, 3), 1e30, ml_dtypes.bfloat16), 1e30, "factor")
    with pytest.raises(LoraFormatError, match="LF-612"):
        adapt(lf.Adapter({"a.weight": lf.Update((big,))}), **ways)


def test_the_change_of_a_vector_stays_as_it_is():
    part = Delta(normal(5))
    adapted = adapt(lf.Adapter({"a.bias": lf.Update((part,))}), to_lora=2)
    assert adapted.adapter["a.bias"].parts == (part,)
    assert not adapted.residuals


def test_the_command_says_what_it_altered(run, tmp_path):
    lf.save(mixed(), tmp_path / "a.safetensors")
    words = ("convert", "a.safetensors", "b.safetensors", "--to-lora", "1")
    told = run(*words, "--drop", "magnitude")
    assert told.code == 0
    assert "ΔW moved by at most" in told.err
    assert "dropped" in told.err
    told = run(*words, "--json", "--force")
    adapter, made = lf.load(tmp_path / "a.safetensors"), lf.load(tmp_path / "b.safetensors")
    for key, residual in told.json["residuals"].items():
        assert relative_error(made[key].matrix(), adapter[key].matrix()) == pytest.approx(residual, abs=1e-6)
