"""PEFT's combination types give PEFT's numbers, draws included: what ``add_weighted_adapter`` made, written by PEFT."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat as lf
from loraformat.testing import relative_error

HERE = Path(__file__).parent / "golden" / "combine"
SEED, DENSITY = 7, 0.6
WEIGHTS = {"one": 0.7, "two": -1.3, "three": 0.4}
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
CASES = {
    **dict.fromkeys(ON_FACTORS, (("one", "two"), None)),
    "cat": (("one", "two", "three"), None),
    "svd": (("one", "two", "three"), 2),
    **{f"{name}_svd": (("one", "two", "three"), 4) for name in ON_FACTORS[1:]},
}


def read(name):
    """PEFT draws for ΔW as it lies in the base; of a Conv1D only the base knows how that is."""
    adapter = lf.load(HERE / name)
    places = {"b_conv1d.weight": lf.Placement((10, 13), (1,), (0,))}
    return replace(adapter, targets={k: replace(u, placement=places.get(k)) for k, u in adapter.items()})


def combined(name, method=None):
    names, rank = CASES.get(name, (("two",), None))
    density = DENSITY if any(word in name for word in ("ties", "dare", "prune")) else None
    given = [(read(n), WEIGHTS[n]) for n in names]
    return lf.combine(given, method or f"peft_{name}", rank=rank, density=density, seed=SEED).adapter


def of_peft(name):
    """Key → (ΔW as the factors have it, A, B)."""
    tensors = load_file(HERE / f"{name}.safetensors")
    found = {}
    for module in sorted({key.rpartition(".")[0] for key in tensors}):
        delta, a, b = (tensors[f"{module}.{what}"] for what in ("delta", "A", "B"))
        turned = module in ("b_conv1d", "d_embed")
        found[f"{module}.weight"] = (delta.T if turned else delta.reshape(len(delta), -1), a, b)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_change_is_that_of_peft(name):
    ours, theirs = combined(name), of_peft(name)
    assert ours.keys() == theirs.keys()
    for key, (delta, _, _) in theirs.items():
        assert relative_error(ours[key].matrix(), delta) < 2e-6, key


@pytest.mark.parametrize("name", ON_FACTORS)
def test_the_factors_are_those_of_peft(name):
    ours = combined(name)
    for key, (_, a, b) in of_peft(name).items():
        np.testing.assert_allclose(ours[key]["lora"].lora_A, a, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(ours[key]["lora"].lora_B, b, rtol=1e-6, atol=1e-7)
        assert ours[key].scale == 1.0


def test_factors_beside_each_other_are_those_of_peft_without_its_rows_of_zeros():
    for key, (_, a, b) in of_peft("cat").items():
        part = combined("cat")[key]["lora"]
        np.testing.assert_allclose(part.lora_A, a[: part.r], rtol=1e-6)
        np.testing.assert_array_equal(part.lora_B, b[:, : part.r])
        assert not a[part.r :].any()


def test_one_adapter_alone_is_only_multiplied_whatever_the_type():
    ours = lf.combine([(lf.load(HERE / "two"), WEIGHTS["two"])], "peft_svd").adapter
    for key, (delta, a, _) in of_peft("alone").items():
        assert relative_error(ours[key].matrix(), delta) < 1e-6
        np.testing.assert_allclose(ours[key]["lora"].lora_A, a, rtol=1e-6)


@pytest.mark.parametrize(("name", "method"), [("cat", "cat"), ("cat", "linear"), ("svd", "svd")])
def test_what_is_exact_with_both_is_the_same_with_both(name, method):
    ours = combined(name, method)
    for key, (delta, _, _) in of_peft(name).items():
        assert relative_error(ours[key].matrix(), delta) < 2e-6


def test_another_seed_gives_other_numbers():
    given = [(lf.load(HERE / n), 1.0) for n in ("one", "two")]
    one, other = (lf.combine(given, "peft_dare_linear", density=0.5, seed=seed).adapter for seed in (1, 2))
    assert lf.digest(one) != lf.digest(other)
