"""A → X → Y → A over every pair of layouts that share a name space: ΔW stays, and the digest where nothing was folded."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loraformat as lf
from loraformat import Adapter, Lora, LoraFormatError, Update, registry
from loraformat.axes import Placement
from loraformat.layout import ReadOptions
from loraformat.testing import relative_error
from loraformat.verbs.adapt import fold_scale
from loraformat.verbs.convert import save

ENDINGS = {"native": ".safetensors", "peft": "", "loralib": ".safetensors", "kohya": ".safetensors", "mlx": ""}
ENDINGS |= {"nnx": ".npz", "qwix": ".msgpack", "gemma": ".msgpack", "lorax": ".npz"}
SPACES = {
    "torch": ("native", "peft", "loralib"),
    "flax": ("native", "nnx", "qwix", "gemma", "lorax"),
    "kohya": ("native", "kohya"),
    "mlx": ("native", "mlx"),
}
STATED = {"loralib": ("alpha/r", 3), "qwix": ("factor", None), "lorax": ("factor", None)}
"""Of a layout without a scale: by which rule, and with which rank, it is told the one that the adapter had."""

WORDS = st.sampled_from(
    ["lora", "weight", "default", "lora_A", "0", "q_proj", "base_model", "ünïcode", "a_b", "x-y", "alpha"]
)
SIZES = st.sampled_from([(5, 7), (11, 6), (8, 8)])


def key(space, words):
    if space == "flax":
        return "/".join(["m", *words, "kernel"])
    if space == "kohya":
        return "lora_unet_" + "_".join(words).replace("-", "_") + ".weight"
    return ".".join(["m", *words, "weight"])


@st.composite
def adapters(draw, space):
    """A few pairs of rank 3 under names that look like a layout's own words; the scale is 2 everywhere."""
    names = draw(st.lists(st.lists(WORDS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3, unique=True))
    seed, targets = np.random.default_rng(draw(st.integers(0, 99))), {}
    for words in names:
        out, in_ = draw(SIZES)
        a, b = (seed.standard_normal(shape).astype(np.float32) for shape in ((3, in_), (out, 3)))
        place = Placement((in_, out), (1,), (0,)) if space == "flax" else None
        part = Lora(a, b, 2.0, "factor") if space == "flax" else Lora(a, b, 6.0, "alpha/r")
        targets[key(space, words)] = Update((part,), place)
    return Adapter(targets, names=space)


def through(adapter, layout, folder):
    """The adapter written in a layout and read again; None where the layout refuses it by its rule."""
    path = folder / f"{layout}{ENDINGS[layout]}"
    if layout in ("nnx", "gemma"):
        adapter = fold_scale(adapter).adapter
    try:
        save(adapter, path, registry.layout(layout), force=True)
    except LoraFormatError as error:
        assert {problem.rule for problem in error.problems} == {"LF-508"}, error
        return None
    options = ReadOptions()
    if layout in STATED:
        rule, rank = STATED[layout]
        scale = next(iter(adapter.values())).scale
        options = ReadOptions(alpha=scale * (rank or 1), rank=rank, scale_rule=rule)
    return registry.read(path, layout, options)[0].adapter


PAIRS = [(space, *pair) for space, own in SPACES.items() for pair in itertools.permutations(own, 2)]


@pytest.mark.parametrize(("space", "one", "other"), PAIRS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_change_survives_two_layouts(space, one, other, data, tmp_path):
    adapter = data.draw(adapters(space))
    here = through(adapter, one, tmp_path)
    there = through(here, other, tmp_path) if here is not None else None
    if there is None:
        return
    assert sorted(there) == sorted(adapter)
    assert there.names == space
    for name, update in adapter.items():
        assert relative_error(there[name].matrix(), update.matrix()) < 1e-6, name


@pytest.mark.parametrize(("space", "layout"), [("torch", "peft"), ("kohya", "kohya"), ("mlx", "mlx")])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_states_the_scale_by_the_same_rule_keeps_the_digest(space, layout, data, tmp_path):
    adapter = data.draw(adapters(space))
    again = through(adapter, layout, tmp_path)
    if again is None or layout == "mlx":  # which states the factor itself
        return
    assert lf.digest(again) == lf.digest(adapter)


def test_most_pairs_of_layouts_carry_a_plain_adapter(tmp_path):
    """The chains above would pass if every layout refused everything."""
    for space, own in SPACES.items():
        part = Lora(
            np.ones((3, 7), np.float32),
            np.ones((5, 3), np.float32),
            *((2.0, "factor") if space == "flax" else (6.0, "alpha/r")),
        )
        place = Placement((7, 5), (1,), (0,)) if space == "flax" else None
        adapter = Adapter({key(space, ("q_proj",)): Update((part,), place)}, names=space)
        carried = [layout for layout in own if through(adapter, layout, tmp_path) is not None]
        assert set(carried) == set(own), space
