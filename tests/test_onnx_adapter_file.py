"""``.onnx_adapter``: onnxruntime's own bytes, read whole or refused; what is damaged never ends the process."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from graphs import adapter, lora

import loraformat as lf
from loraformat import Adapter, LoraFormatError, Placement, Update, testing
from loraformat.layout import ReadOptions
from loraformat.registry import detect, layout, load, read
from loraformat.source import open_source
from loraformat.testing import relative_error
from loraformat.verbs.convert import convert, save
from loraformat_converters.onnx import tort

LAYOUT = layout("onnx_adapter")
KEY = "model.layers.0.self_attn.q_proj.weight"


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def written(path, tensors, adapter_version=1, model_version=1):
    """A file as Olive 0.13 makes it, by the same calls."""
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(adapter_version)
    made.set_model_version(model_version)
    made.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(t) for n, t in tensors.items()})
    made.export_adapter(str(path))
    return path


STYLES = {
    "native": ("lora/model.layers.0.self_attn.q_proj.weight/{}", KEY),
    "olive": ("model.layers.0.self_attn.q_proj.lora_{}.weight", KEY),
    "olive of TorchScript": ("base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight", KEY),
    "olive of dynamo": ("base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight", KEY),
    "genai": ("model.layers.0.attn.q_proj.lora_{}.MatMul.weight", KEY.replace("self_attn", "attn")),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_file_of_onnxruntime_is_read_by_the_names_of_each_style(style, tmp_path):
    name, key = STYLES[style]
    a, b = normal(5, 3), normal(3, 7)
    path = written(tmp_path / "a.onnx_adapter", {name.format("A"): a, name.format("B"): b})
    testing.check_claimed_alone(LAYOUT, path)
    told = ReadOptions(alpha=1.0, scale_rule="factor") if "olive" in style else ReadOptions()
    (found,) = read(path, options=told)[0].adapter.items()
    assert (found[0], found[1].scale, found[1].rank, found[1].kind) == (key, 1.0, 3, "lora")
    assert relative_error(found[1].matrix(), (a @ b).T) <= 1e-6


OLIVE = Path(__file__).parent / "golden/olive"


@pytest.mark.parametrize("made_by", ["converted", "extracted"])
def test_what_olive_wrote_is_read_with_the_scale_that_is_stated(made_by):
    """Its two commands give the same names, one with the scale in B and one without: which it was, no file says."""
    path, golden = OLIVE / f"{made_by}.onnx_adapter", json.loads((OLIVE / "golden.json").read_text())
    testing.check_claimed_alone(LAYOUT, path)
    with pytest.raises(LoraFormatError, match=r"LF-509.*convert-adapters has the scale in B"):
        load(path)
    told = ReadOptions(alpha=1.0, scale_rule="factor")
    if made_by == "extracted":
        told = ReadOptions(alpha=float(golden["alpha"]), scale_rule="alpha/r")
    found = {key.removeprefix("m."): update for key, update in read(path, options=told)[0].adapter.items()}
    with np.load(OLIVE / "deltas.npz") as wanted:
        names = {key.removeprefix("m.").removeprefix("base_model.model."): key for key in wanted.files}
        assert found.keys() == names.keys()
        for key, update in found.items():
            assert relative_error(update.matrix(), wanted[names[key]]) <= 1e-6


def test_kernels_and_batches_are_read_where_their_shapes_tell_them(tmp_path):
    conv, batch = (normal(3, 5, 2, 4), normal(7, 3, 1, 1)), (normal(4, 5, 3), normal(4, 3, 7))
    tensors = {
        f"lora/{key}/{s}": t for key, pair in (("c", conv), ("b", batch)) for s, t in zip("AB", pair, strict=True)
    }
    found = load(written(tmp_path / "a.onnx_adapter", tensors))
    assert relative_error(found["c"].matrix(), conv[1][:, :, 0, 0] @ conv[0].reshape(3, -1)) <= 1e-6
    assert relative_error(found["b"].matrix(), np.swapaxes(batch[0] @ batch[1], 1, 2)) <= 1e-6
    both = {"lora/x/A": normal(3, 5, 3), "lora/x/B": normal(3, 3, 1)}  # a batch of three, or a kernel of three
    with pytest.raises(LoraFormatError, match=r"LF-506.*two kinds of pair"):
        load(written(tmp_path / "x.onnx_adapter", both))


BAD = {
    "a strange name": ({"lora/x/A": normal(5, 2), "lora/x/B": normal(2, 7), "norm.bias": normal(3)}, "LF-506"),
    "a factor alone": ({"lora/x/A": normal(5, 2)}, "LF-303"),
    "ranks that differ": ({"lora/x/A": normal(5, 2), "lora/x/B": normal(3, 7)}, "LF-506"),
    "PEFT's own axes": ({"lora/x/A": normal(2, 5), "lora/x/B": normal(7, 2)}, "LF-506"),
    "one target twice": (
        {f"{p}x.lora_{s}.MatMul.weight": normal(4, 4) for p in ("", "base_model.model.") for s in "AB"},
        "LF-507",
    ),
    "nothing but rank 0": ({"lora/x/A": normal(5, 0), "lora/x/B": normal(0, 7)}, "LF-304"),
    "no float": ({"lora/x/A": np.ones((5, 2), np.int64), "lora/x/B": np.ones((2, 7), np.int64)}, "LF-106"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_understood_is_refused(case, tmp_path):
    tensors, rule = BAD[case]
    with pytest.raises(LoraFormatError, match=rule):
        load(written(tmp_path / "a.onnx_adapter", tensors))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_what_is_written_is_read_back_bit_for_bit(dtype, tmp_path):
    given = adapter({KEY: lora(7, 5, rank=3, alpha=3, dtype=dtype), "wte.weight": lora(4, 9, alpha=2, dtype=dtype)})
    save(given, tmp_path / "a.onnx_adapter", LAYOUT)
    found = load(tmp_path / "a.onnx_adapter")
    for key, update in given.items():
        for role in ("lora_A", "lora_B"):
            one, two = getattr(found[key]["lora"], role), getattr(update["lora"], role)
            assert (one.dtype, one.tolist()) == (two.dtype, two.tolist())
    again = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter"))
    assert sorted(again.get_parameters()) == sorted(f"lora/{key}/{side}" for key in given for side in "AB")
    assert again.get_parameters()[f"lora/{KEY}/A"].shape() == [5, 3]
    assert again.get_adapter_version() == tort.read(tmp_path / "a.onnx_adapter").adapter_version >= 1 << 30


def test_a_convolution_is_written_as_its_kernels(tmp_path):
    update = Update(lora(7, 5 * 2 * 4, rank=3).parts, Placement((7, 5, 2, 4), (0,), (1, 2, 3)))
    save(Adapter({"c.weight": update}), tmp_path / "a.onnx_adapter", LAYOUT)
    shapes = {n: t.shape for n, t in tort.read(tmp_path / "a.onnx_adapter").tensors.items()}
    assert shapes == {"lora/c.weight/A": (3, 5, 2, 4), "lora/c.weight/B": (7, 3, 1, 1)}
    assert relative_error(load(tmp_path / "a.onnx_adapter")["c.weight"].matrix(), update.matrix()) <= 1e-6


def test_a_scale_has_no_place_and_is_folded_only_when_asked(tmp_path, run):
    given = adapter({KEY: lora(7, 5, alpha=3)})
    lf.save(given, tmp_path / "a.safetensors")
    done = run("convert", "a.safetensors", "b.onnx_adapter")
    assert (done.code, "LF-508" in done.err, "--fold-scale" in done.err) == (1, True, True)
    assert run("convert", "a.safetensors", "b.onnx_adapter", "--fold-scale").code == 0
    assert relative_error(load(tmp_path / "b.onnx_adapter")[KEY].matrix(), given[KEY].matrix()) <= 1e-6


@pytest.mark.parametrize("kind", sorted(set(testing.KINDS) - {"lora", "conv", "embedding", "experts"}))
def test_what_is_no_pair_is_refused(kind, tmp_path):
    with pytest.raises(LoraFormatError, match="LF-508"):
        save(testing.random_adapter(kinds=(kind,)), tmp_path / "a.onnx_adapter", LAYOUT)


@pytest.mark.parametrize("stated", [{"alpha": 3.0}, {"scale_rule": "alpha/r"}, {"rank": 5}])
def test_a_statement_that_contradicts_the_file_is_an_error(stated, tmp_path):
    save(adapter({KEY: lora(7, 5, alpha=2)}), tmp_path / "a.onnx_adapter", LAYOUT)
    with pytest.raises(LoraFormatError, match="LF-507"):
        convert(tmp_path / "a.onnx_adapter", tmp_path / "b.safetensors", options=lf.layout.ReadOptions(**stated))


def test_a_value_that_changed_since_it_was_written_is_found(tmp_path):
    path = tmp_path / "a.onnx_adapter"
    save(adapter({KEY: lora(7, 5, alpha=2)}), path, LAYOUT)
    data = bytearray(path.read_bytes())
    value = struct.pack("<f", float(tort.read(path).tensors[f"lora/{KEY}/A"][0, 0]))
    data[data.index(value)] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoraFormatError, match="LF-507"):
        load(path)


def test_a_damaged_file_is_a_fault_and_never_more(tmp_path):
    path = written(tmp_path / "a.onnx_adapter", {"lora/x/A": normal(5, 2), "lora/x/B": normal(2, 7)})
    whole, draw = path.read_bytes(), random.Random(5)
    for end in range(8, len(whole) - 1, 7):
        path.write_bytes(whole[:end])
        with pytest.raises(LoraFormatError):
            load(path)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 5])):
            data[draw.randrange(8, len(data))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        path.write_bytes(data)
        with contextlib.suppress(LoraFormatError):
            load(path)


def test_sizes_that_do_not_fit_the_bytes_are_refused(tmp_path):
    path = written(tmp_path / "a.onnx_adapter", {"lora/x/A": normal(5, 2), "lora/x/B": normal(2, 7)})
    whole = path.read_bytes()
    for size in (5_000_000, 2**62, -5):
        path.write_bytes(whole.replace(struct.pack("<q", 5), struct.pack("<q", size)))
        with pytest.raises(LoraFormatError, match="LF-108"):
            load(path)


def test_the_identifier_alone_tells_the_layout(tmp_path):
    path = written(tmp_path / "some.dat", {"lora/x/A": normal(5, 2), "lora/x/B": normal(2, 7)})
    assert detect(open_source(path))[0].name == "onnx_adapter"
