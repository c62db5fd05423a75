"""candle-lora: a file is read by the numbers that it has, and only where its two ways of computing agree.

The files are of the form that its source writes (675d3d2 loralinear.rs); the crate itself is not run.
"""

import json

import numpy as np
import pytest
from refused import rules_of
from safetensors.numpy import save_file

import loraformat as lf
from loraformat import testing
from loraformat.layout import ReadOptions
from loraformat.source import open_source
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget
from loraformat_converters.candle import NAMES, layout

DRAW = np.random.default_rng(6)


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def file_of(folder, prefix="lora_linear", **more):
    """Two modules of rank 3, as ``get_tensors`` names them."""
    shapes = {"a0": (3, 11), "b0": (7, 3), "a12": (3, 7), "b12": (5, 3)}
    tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in shapes.items()}
    save_file(tensors | more, folder / "a.safetensors")
    return folder / "a.safetensors", tensors


ONE = ReadOptions(alpha=3, scale_rule="alpha/r")


@pytest.mark.parametrize("prefix", ["", "lora_linear", "model.layers.", "näme."])
def test_modules_go_by_prefix_and_number_and_mean_b_times_a(prefix, tmp_path):
    path, tensors = file_of(tmp_path, prefix)
    testing.check_claimed_alone(layout, path)
    adapter = layout.read(open_source(path), ONE).adapter
    assert set(adapter) == {f"{prefix}0.weight", f"{prefix}12.weight"}
    assert adapter.names == NAMES
    wanted = tensors[f"{prefix}b12.weight"] @ tensors[f"{prefix}a12.weight"]
    assert testing.relative_error(adapter[f"{prefix}12.weight"].matrix(), wanted) <= 1e-6


def test_a_map_of_names_leads_to_the_model(tmp_path, run):
    file_of(tmp_path)
    (tmp_path / "map.json").write_text(
        json.dumps({"lora_linear0.weight": "q.weight", "lora_linear12.weight": "o.weight"})
    )
    told = run("convert", "a.safetensors", "b.safetensors", "--alpha", "3", "--scale-rule", "alpha/r")
    assert told.code == 0, told.err
    told = run("retarget", "b.safetensors", "--to", "torch", "--names", "map.json", "-o", "c.safetensors")
    assert told.code == 0, told.err
    assert set(lf.load(tmp_path / "c.safetensors")) == {"q.weight", "o.weight"}


def test_what_is_not_known_or_has_no_form_is_refused(tmp_path):
    path, _ = file_of(tmp_path)
    assert rules_of(lf.load, path) == {"LF-509"}
    twice = ReadOptions(alpha=6, scale_rule="alpha/r")
    assert rules_of(layout.read, open_source(path), twice) == {"LF-504"}
    kernel = {f"{role}3.weight": normal(3, 4, 3, 3) for role in "ab"}
    assert rules_of(layout.read, open_source(file_of(tmp_path, **kernel)[0]), ONE) == {"LF-309"}
    stray = open_source(file_of(tmp_path, **{"x.weight": normal(2)})[0])
    assert layout.detect(stray) is None
    assert rules_of(layout.read, stray, ONE) == {"LF-506"}
    adapter = layout.read(open_source(file_of(tmp_path)[0]), ONE).adapter
    assert rules_of(save, adapter, tmp_path / "out", layout) == {"LF-508"}
    assert rules_of(retarget, adapter, "torch") == {"LF-705"}


def test_glora_of_lycoris_is_no_file_of_candle(tmp_path):
    names = ("a1", "a2", "b1", "b2")
    save_file({f"lora_unet_to_q.{name}.weight": normal(3, 3) for name in names}, tmp_path / "g.safetensors")
    assert layout.detect(open_source(tmp_path / "g.safetensors")) is None
