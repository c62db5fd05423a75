"""The published laws: they hold for the layouts at hand, and each fails for a layout that breaks it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from peft_goldens import adapter_of

from loraformat import canonical, file, registry, testing
from loraformat.layout import NATIVE, Output, Reading
from loraformat.parts import Lora
from loraformat.testing import LayoutLaws, strategies
from loraformat.updates import Update


class TestNative(LayoutLaws):
    layout = NATIVE
    kinds = testing.KINDS


class TestPeft(LayoutLaws):
    layout = registry.layout("peft")
    kinds = ("lora", "conv", "embedding")
    files = (adapter_of("linear"), adapter_of("gpt2"))


@dataclass
class Careless:
    """The native layout with one mistake."""

    mistake: str
    name: str = "careless"
    carries: frozenset[str] = NATIVE.carries

    def detect(self, source):
        return "it looks like one" if self.mistake != "claims nothing" else None

    def read(self, source, options):
        if self.mistake in ("skips", "forgets"):
            return self.read_what_is_known(source)
        adapter = NATIVE.read(source, options).adapter
        return Reading(replace(adapter, targets={k: self.spoilt(u) for k, u in adapter.items()}))

    def spoilt(self, update):
        match self.mistake, update.parts:
            case "drops the scale", (Lora() as part,):
                return Update((replace(part, alpha=float(part.r), scale_rule="alpha/r"),), update.placement)
            case "rounds", (Lora() as part,):
                return Update((replace(part, lora_A=part.lora_A.astype(np.float16)),), update.placement)
        return update

    def read_what_is_known(self, source):
        """Only what is understood, in silence: the worst that a reader can do."""
        tensors = dict(source.tensors)
        pairs = {n.removesuffix(".lora_A") for n in tensors if n.endswith(".lora_A")}
        return Reading(
            type(EMPTY)({k: Update((Lora(tensors[f"{k}.lora_A"], tensors.get(f"{k}.lora_B"), 1, "factor"),)) for k in pairs})
        )  # fmt: skip

    def write(self, adapter, options):
        return Output({"": file.writer(adapter)}, folder=False)


EMPTY = testing.random_adapter()


@pytest.fixture
def native_file(tmp_path):
    path = tmp_path / "native.safetensors"
    file.save(testing.random_adapter(5, ("lora", "conv")), path)
    return path


def test_a_lost_scale_fails_the_round_trip(tmp_path):
    with pytest.raises(AssertionError):
        testing.check_round_trip(Careless("drops the scale"), testing.random_adapter(5), tmp_path)


def test_rounded_factors_fail_the_round_trip_and_the_rewriting(tmp_path, native_file):
    with pytest.raises(AssertionError):
        testing.check_round_trip(Careless("rounds"), testing.random_adapter(5), tmp_path)
    with pytest.raises(AssertionError):
        testing.check_rewrite(Careless("rounds"), native_file, tmp_path)


def test_a_layout_that_claims_what_is_another_s_fails(native_file):
    with pytest.raises(AssertionError, match="claimed by"):
        testing.check_claimed_alone(Careless("claims all"), native_file)


def test_a_layout_that_skips_tensors_fails(tmp_path, native_file):
    with pytest.raises(AssertionError):
        testing.check_nothing_skipped(Careless("skips"), native_file, tmp_path)


def test_a_layout_that_folds_in_silence_fails(tmp_path):
    with pytest.raises(AssertionError):
        testing.check_exact_or_refused(Careless("drops the scale"), testing.random_adapter(5), tmp_path)


def test_a_layout_that_refuses_says_so_by_its_rule_and_leaves_nothing(tmp_path):
    narrow = Careless("carries little", carries=frozenset({"lora"}))
    assert testing.check_exact_or_refused(narrow, testing.random_adapter(5), tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    assert not testing.check_exact_or_refused(narrow, testing.random_adapter(5, ("delta",)), tmp_path)


@given(strategies.adapters())
@settings(max_examples=20)
def test_every_adapter_of_the_strategy_can_be_written(adapter):
    text, tensors = file.check(adapter)
    assert isinstance(tensors, Mapping)
    assert canonical.dumps(canonical.loads(text)) == text


@given(strategies.placements(), strategies.keys())
@settings(max_examples=60)
def test_every_placement_of_the_strategy_is_one(placement, key):
    assert placement.fault() is None
    tensor = np.arange(np.prod(placement.shape)).reshape(placement.shape)
    assert (placement.from_matrix(placement.to_matrix(tensor)) == tensor).all()
    assert key
