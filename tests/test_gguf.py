"""The GGUF layout: what llama.cpp's converter wrote is read as llama.cpp means it, and written again as it was."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from gguf_goldens import FILES, check_deltas, file_of
from ml_dtypes import bfloat16
from refused import problems_of

import loraformat as lf
from loraformat import Adapter, Lora, Update, registry, testing
from loraformat.axes import Placement
from loraformat.layout import WriteOptions
from loraformat.parts import Magnitude
from loraformat.verbs.convert import save
from loraformat_converters.gguf import keys, layout, store
from loraformat_converters.gguf.cursor import Value
from loraformat_converters.gguf.file import GgufFile

LLAMA = WriteOptions(config={"model_type": "llama"})


def pair(rank, out, inner, alpha, rule="alpha/r", seed=0, batch=(), dtype=np.float32):
    draw = np.random.default_rng([seed, rank, out, inner])
    a, b = (draw.standard_normal((*batch, *shape)).astype(dtype) for shape in ((rank, inner), (out, rank)))
    return Update((Lora(a, b, alpha, rule),))


def adapter(**targets):
    return Adapter({key.replace("__", "."): update for key, update in targets.items()}, "gguf")


# What llama.cpp's converter wrote.


@pytest.mark.parametrize("case", FILES)
def test_the_change_is_that_of_the_merged_model(case):
    check_deltas(case)


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_claimed_by_this_layout_alone(case):
    testing.check_claimed_alone(layout, file_of(case))


@pytest.mark.parametrize("case", [case for case in FILES if "q8_0" not in case])
def test_a_file_goes_through_the_native_one_and_back(case, tmp_path):
    """With the same tensors and the same metadata, both byte for byte."""
    lf.convert(file_of(case), tmp_path / "kept.lora.safetensors")
    lf.convert(tmp_path / "kept.lora.safetensors", tmp_path / "again.gguf")
    before, after = GgufFile(file_of(case)), GgufFile(tmp_path / "again.gguf")
    assert before.metadata == after.metadata
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (
            after[name].dtype,
            after[name].shape,
            after[name].tobytes(),
        )


# What is read.

HEAD = {
    keys.ARCHITECTURE: Value("str", "llama"),
    "general.type": Value("str", "adapter"),
    "adapter.type": Value("str", "lora"),
    keys.ALPHA: Value("f32", 6.0),
}
A, B = np.ones((2, 7), np.float32), np.ones((5, 2), np.float32)
TENSORS = {"blk.0.attn_q.weight.lora_a": A, "blk.0.attn_q.weight.lora_b": B}


def written(path, tensors=None, drop=(), **metadata):
    """A GGUF file with other metadata or tensors."""
    head = {key: value for key, value in HEAD.items() if key not in drop}
    with open(path, "wb") as file:
        store.write(file, head | {key.replace("__", "."): v for key, v in metadata.items()}, tensors or TENSORS)
    return path


def test_an_alpha_of_zero_is_a_scale_of_one(tmp_path):
    zero = lf.load(written(tmp_path / "a.gguf", adapter__lora__alpha=Value("f32", 0.0)))
    assert zero["blk.0.attn_q.weight"].scale == 1.0
    reading, _, _ = registry.read(written(tmp_path / "b.gguf", drop=[keys.ALPHA]))
    assert reading.adapter["blk.0.attn_q.weight"].scale == 1.0
    assert [(w.rule, w.severity) for w in reading.warnings] == [("LF-509", "warning")]
    assert lf.load(written(tmp_path / "c.gguf"))["blk.0.attn_q.weight"].scale == 3.0


@pytest.mark.parametrize(
    ("changes", "rule", "word"),
    [
        ({"general__type": Value("str", "model")}, "LF-504", "'model'"),
        ({"adapter__type": Value("str", "control_vector")}, "LF-504", "control_vector"),
        ({"adapter__type": Value("u32", 1)}, "LF-503", "type u32"),
        ({"adapter__lora__alpha": Value("f64", 6.0)}, "LF-503", "f32"),
        ({"adapter__lora__alpha": Value("f32", float("nan"))}, "LF-503", "finite"),
        ({"adapter__alora__invocation_tokens": Value("[u32]", [1, 2])}, "LF-504", "aLoRA"),
        ({"drop": ["general.type"]}, "LF-504", "None"),
        ({"drop": [keys.ARCHITECTURE]}, "LF-503", "architecture"),
    ],
)
def test_metadata_of_something_else_is_refused(changes, rule, word, tmp_path):
    (problem,) = problems_of(lf.load, written(tmp_path / "a.gguf", **changes), "gguf")
    assert problem.rule == rule
    assert word in problem.what


@pytest.mark.parametrize(
    ("tensors", "rule"),
    [
        ({**TENSORS, "stray": A}, "LF-506"),
        ({"blk.0.attn_q.weight.lora_a": A}, "LF-303"),
        ({"q.weight.lora_a": A, "q.weight.lora_b": B.T.copy()}, "LF-309"),
        ({"q.weight.lora_a": A, "q.weight.lora_b": B[None]}, "LF-309"),
        ({"q.weight.lora_a": A[0], "q.weight.lora_b": B[0]}, "LF-309"),
        ({"token_embd.weight.lora_a": A, "token_embd.weight.lora_b": B}, "LF-309"),  # a lies the other way there
    ],
)
def test_tensors_that_llama_cpp_would_not_load_are_refused(tensors, rule, tmp_path):
    assert {p.rule for p in problems_of(lf.load, written(tmp_path / "a.gguf", tensors))} == {rule}


def test_the_weight_of_a_norm_is_no_part_of_the_adapter_and_that_is_said(tmp_path):
    reading, _, _ = registry.read(written(tmp_path / "a.gguf", {**TENSORS, "blk.0.attn_norm.weight": A[0]}))
    assert list(reading.adapter) == ["blk.0.attn_q.weight"]
    assert [(w.rule, w.where) for w in reading.warnings] == [("LF-506", "blk.0.attn_norm.weight")]


def test_what_the_user_states_may_only_agree(tmp_path):
    path = written(tmp_path / "a.gguf")
    registry.read(path, None, registry.ReadOptions(alpha=6, rank=2, scale_rule="alpha/r"))
    for options in (registry.ReadOptions(alpha=6, scale_rule="factor"), registry.ReadOptions(rank=3)):
        assert {p.rule for p in problems_of(registry.read, path, None, options)} == {"LF-507"}


# What is written.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_what_is_written_is_read_back(dtype, tmp_path):
    ours = adapter(
        blk__0__attn_q__weight=pair(3, 11, 7, 4.5, dtype=dtype),
        token_embd__weight=pair(2, 6, 17, 4.5, dtype=dtype),
        blk__0__ffn_up_exps__weight=pair(2, 5, 8, 4.5, batch=(3,), dtype=dtype),
    )
    assert save(ours, tmp_path / "a.gguf", layout, LLAMA) == []
    again = lf.load(tmp_path / "a.gguf")
    for key, update in ours.items():
        assert again[key]["lora"].lora_A.tobytes() == update["lora"].lora_A.tobytes()
        assert again[key]["lora"].lora_B.tobytes() == update["lora"].lora_B.tobytes()
        assert (again[key]["lora"].alpha, again[key]["lora"].scale_rule) == (4.5, "alpha/r")


def test_the_gguf_package_reads_what_is_written(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the peer gguf")
    ours = adapter(token_embd__weight=pair(2, 6, 17, 6), a__weight=pair(3, 5, 7, 6, dtype=bfloat16))
    save(ours, tmp_path / "a.gguf", layout, LLAMA)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {key: field.contents() for key, field in reader.fields.items() if "." in key and "GGUF" not in key} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    shapes = {t.name: ([int(n) for n in t.shape], t.tensor_type.name) for t in reader.tensors}
    assert shapes == {
        "token_embd.weight.lora_a": ([2, 17], "F32"),
        "token_embd.weight.lora_b": ([2, 6], "F32"),
        "a.weight.lora_a": ([7, 3], "BF16"),
        "a.weight.lora_b": ([3, 5], "BF16"),
    }
    stored = {t.name: t.data for t in reader.tensors}
    assert np.array_equal(stored["token_embd.weight.lora_a"], ours["token_embd.weight"]["lora"].lora_A.T)


def test_what_the_gguf_package_writes_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the peer gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6)
    writer.add_array("general.tags", ["a", "層"])
    writer.add_custom_alignment(64)
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((3, 64)).astype(np.float32), draw.standard_normal((5, 3)).astype(np.float32)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b)
    quants = gguf.quants.quantize(a, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", quants, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = lf.load(tmp_path / "a.gguf")["blk.0.attn_q.weight"]
    assert np.array_equal(found["lora"].lora_B, b)
    assert np.array_equal(found["lora"].lora_A, gguf.quants.dequantize(quants, gguf.GGMLQuantizationType.Q8_0))
    lf.convert(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert GgufFile(tmp_path / "b.gguf").metadata["general.tags"] == Value("[str]", ["a", "層"])


def test_one_alpha_is_stored_and_what_differs_is_folded_and_said(tmp_path):
    ours = adapter(
        a__weight=pair(2, 5, 7, 6),
        b__weight=pair(4, 6, 7, 6),
        c__weight=pair(4, 8, 7, 6, "alpha/sqrt(r)"),
        d__weight=pair(3, 9, 7, 0.7, "factor"),
        e__weight=pair(3, 10, 7, 0.0),
    )
    warnings = save(ours, tmp_path / "a.gguf", layout, LLAMA)
    assert [(w.rule, w.severity) for w in warnings] == [("LF-508", "warning")] * 3
    assert [(w.where, w.what.rpartition("; ")[2][:8]) for w in warnings] == [
        ("c.weight", "exact"), ("d.weight", "residual"), ("e.weight", "exact"),
    ]  # fmt: skip
    again = lf.load(tmp_path / "a.gguf")
    for key, update in ours.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-7, key
    assert {u["lora"].alpha for u in again.values()} == {6.0}


def test_rslora_of_one_rank_needs_no_folding(tmp_path):
    ours = adapter(a__weight=pair(8, 5, 7, 6, "alpha/sqrt(r)"), b__weight=pair(8, 6, 7, 6, "alpha/sqrt(r)"))
    assert save(ours, tmp_path / "a.gguf", layout, LLAMA) == []
    again = lf.load(tmp_path / "a.gguf")
    for key, update in ours.items():
        assert again[key]["lora"].lora_B.tobytes() == update["lora"].lora_B.tobytes()
        assert abs(again[key].scale / update.scale - 1) < 2**-24


def test_an_alpha_of_zero_is_never_written(tmp_path):
    for alpha in (0.0, 1e-60, -0.0):
        ours = adapter(a__weight=pair(2, 5, 7, alpha), b__weight=pair(2, 5, 7, alpha))
        save(ours, tmp_path / "a.gguf", layout, LLAMA, force=True)
        assert GgufFile(tmp_path / "a.gguf").metadata[keys.ALPHA].value == 1.0
        assert not lf.load(tmp_path / "a.gguf")["a.weight"].matrix().any()


LINEAR, CONV1D = Placement((5, 7), (0,), (1,)), Placement((7, 5), (1,), (0,))


@pytest.mark.parametrize(
    ("ours", "options", "word"),
    [
        (replace(adapter(a__weight=pair(2, 5, 7, 6)), names="torch"), LLAMA, "in the space 'torch'"),
        (adapter(a__weight=pair(2, 5, 7, 6)), WriteOptions(), "the architecture of the base"),
        (adapter(a__weight=pair(2, 5, 7, 6)), WriteOptions(config={"model_type": "bloom"}), "no table for model_type 'bloom'"),
        (replace(adapter(a__weight=pair(2, 5, 7, 6)), extensions={"gguf": keys.kept(HEAD)}), WriteOptions(config={"model_type": "qwen2"}), "llama by the source, qwen2 by config.json"),
        (replace(adapter(a__weight=pair(2, 5, 7, 6)), extensions={"gguf": '{"a": ["u8", 256]}'}), LLAMA, "damaged"),
        (adapter(a__weight=Update((*pair(2, 5, 7, 6).parts, Magnitude(np.ones(5, np.float32))))), LLAMA, "magnitude"),
        (adapter(a__weight=pair(2, 5, 7, 6, dtype=np.float64)), LLAMA, "F64"),
        (adapter(a__weight=pair(2, 5, 7, 6, batch=(2, 3))), LLAMA, "2 batch axes"),
        (adapter(a__weight=pair(2, 5, 7, 6).placed(CONV1D)), LLAMA, "not that of this tensor"),
        (adapter(token_embd__weight=pair(2, 5, 7, 6).placed(LINEAR)), LLAMA, "not that of this tensor"),
        (adapter(a__weight=replace(pair(2, 5, 7, 6).placed(CONV1D), op="embedding")), LLAMA, "looks up the rows"),
        (adapter(**{"a.lora_b.weight": pair(2, 5, 7, 6)}), LLAMA, "would misread"),
        (adapter(**{"a" * 57: pair(2, 5, 7, 6)}), LLAMA, "63 bytes"),
        (adapter(a__weight=pair(2, 5, 7, 1e38), b__weight=pair(2, 5, 7, 1e-30), c__weight=pair(2, 5, 7, 1e-30)), LLAMA, "is beyond float32"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_apply_is_refused(ours, options, word, tmp_path):
    problems = problems_of(save, ours, tmp_path / "a.gguf", layout, options)
    assert {p.rule for p in problems} == {"LF-508"}
    assert any(word in p.what for p in problems), problems
    assert not list(tmp_path.iterdir())


def test_a_damaged_download_is_named(tmp_path):
    path = shutil.copy(file_of("llama"), tmp_path / "a.gguf")
    with open(path, "r+b") as file:
        file.truncate(4000)
    (problem,) = problems_of(lf.load, path)
    assert problem.rule == "LF-511"
    assert "the file at 4,000" in problem.what


def test_a_folder_of_files_is_validated_file_by_file(tmp_path, run):
    written(tmp_path / "good.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    done = run("validate", tmp_path, "--json")
    assert done.code == 1
    found = {entry["path"].rpartition("/")[2]: (entry["valid"], entry["layout"]) for entry in done.json["files"]}
    assert found["good.gguf"] == (True, "gguf")
    assert found["bad.gguf"][0] is False
