"""What ``info`` says of bases, of models with adapters attached, and of what is neither."""

import json

import numpy as np
import onnx
import pytest
from graphs import adapter, lora, model, save
from peft_goldens import adapter_of, base_of
from safetensors.numpy import save_file

import loraformat as lf


@pytest.fixture
def graph(tmp_path):
    made = model(
        """g (float16[N, T, 3] x, int64[N] i) => (float16[N, T, 5] y, float[N, 3] z)
        <float16[3, 4] wa, float16[4, 5] wb, float[7, 3] table> {
          h = MatMul (x, wa)
          y = MatMul (h, wb)
          z = Gather (table, i)
        }"""
    )
    made.producer_name, made.producer_version = "someone", "1.2"
    return save(made, tmp_path / "m.onnx")


def test_a_model_is_described_by_its_ends_and_its_weights(run, graph):
    told = run("info", "m.onnx", "--json")
    assert (told.code, told.err) == (0, "")
    found = told.json
    assert list(found) == [
        *("schema", "path", "kind", "bytes", "ir_version", "opsets", "producer"),
        *("inputs", "outputs", "weights", "external", "attached"),
    ]
    assert (found["schema"], found["path"], found["kind"], found["producer"]) == (1, "m.onnx", "onnx", "someone 1.2")
    assert found["bytes"] == graph.stat().st_size
    assert found["opsets"]["ai.onnx"] == 18
    assert found["inputs"] == [
        {"name": "x", "dtype": "float16", "shape": ["N", "T", 3], "optional": False},
        {"name": "i", "dtype": "int64", "shape": ["N"], "optional": False},
    ]
    assert found["outputs"][1] == {"name": "z", "dtype": "float32", "shape": ["N", 3]}
    uses = {row["operator"]: (row["uses"], row["dtypes"]) for row in found["weights"]}
    assert uses == {"MatMul": (2, ["float16"]), "Gather": (1, ["float32"])}
    assert found["weights"][0]["refused"] is None


def test_what_cannot_be_changed_is_told_with_the_reason(run, tmp_path):
    save(
        model("g (float[N, 4, 3] x) => (float[N, 2, 3] y) <float[2, 2, 1] w> { y = Conv <group = 2> (x, w) }"),
        tmp_path / "m.onnx",
    )
    told = run("info", "m.onnx")
    assert told.code == 0
    assert "not: a convolution of 2 groups" in told.out


def test_an_initializer_that_is_an_input_is_optional(run, tmp_path):
    made = model("g (float[N, 3] x, float[3, 5] w) => (float[N, 5] y) { y = MatMul (x, w) }")
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 5), np.float32), "w"))
    save(made, tmp_path / "m.onnx")
    optional = {value["name"]: value["optional"] for value in run("info", "m.onnx", "--json").json["inputs"]}
    assert optional == {"x": False, "w": True}
    assert "Not fed, since the model holds values for them: w" in run("info", "m.onnx", "--how", "python").out


def test_an_input_without_a_shape_and_one_that_is_no_tensor_are_told_as_they_are(run, tmp_path):
    made = model("g (float[N, 3] x) => (float[N, 5] y) <float[3, 5] w> { y = MatMul (x, w) }")
    made.graph.input.append(onnx.helper.make_tensor_value_info("free", onnx.TensorProto.FLOAT, None))
    made.graph.input.append(onnx.helper.make_tensor_sequence_value_info("list", onnx.TensorProto.FLOAT, None))
    made.graph.input.append(onnx.helper.make_tensor_value_info("odd", onnx.TensorProto.FLOAT, [None, 3]))
    save(made, tmp_path / "m.onnx")
    found = {
        value["name"]: (value["dtype"], value["shape"]) for value in run("info", "m.onnx", "--json").json["inputs"]
    }
    assert found == {
        "x": ("float32", ["N", 3]), "free": ("float32", None), "list": ("sequence", None), "odd": ("float32", [None, 3]),
    }  # fmt: skip
    told = run("info", "m.onnx", "--how", "python")
    assert told.code == 2
    assert "the input free is a float32 of no stated shape" in told.err


def test_data_files_are_listed_with_their_sizes_and_a_missing_one_as_missing(run, tmp_path):
    made = model("g (float[N, 300] x) => (float[N, 5] y) <float[300, 5] w> { y = MatMul (x, w) }")
    onnx.save_model(made, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert run("info", "m.onnx", "--json").json["external"] == [{"file": "m.data", "bytes": 6000}]
    (tmp_path / "m.data").unlink()
    assert run("info", "m.onnx", "--json").json["external"] == [{"file": "m.data", "bytes": None}]
    assert "data: m.data  missing" in run("info", "m.onnx").out


def test_an_attached_adapter_is_told_by_name_digest_and_targets(run, tmp_path):
    save(model("g (float[N, 3] x) => (float[N, 5] y) <float[3, 5] w> { y = MatMul (x, w) }"), tmp_path / "m.onnx")
    made = adapter({"w": lora(5, 3)})
    lf.save(made, tmp_path / "a.safetensors")
    assert run("attach", "style=a.safetensors", "--to", "m.onnx", "-o", "out.onnx").code == 0
    assert run("info", "out.onnx", "--json").json["attached"] == [
        {"name": "style", "mode": "branch", "digest": lf.digest(made), "targets": ["w"]}
    ]
    assert f"attached: style (branch, 1 target, digest {lf.digest(made)[:12]})" in run("info", "out.onnx").out
    assert [(row["operator"], row["uses"]) for row in run("info", "out.onnx", "--json").json["weights"]] == [
        ("MatMul", 1)
    ]
    weights = run("info", "out.onnx", "--json").json["weights"]
    assert [(row["operator"], row["uses"]) for row in weights] == [("MatMul", 1)]
    assert "# Attached: style (branch, 1 target), always on." in run("info", "out.onnx", "--how", "python").out


@pytest.mark.parametrize("record", ["", "{", "[]", "3", '{"name": 5, "targets": 7}', '{"targets": {"a": 1}}'])
def test_a_record_that_somebody_edited_breaks_nothing(run, graph, record):
    made = onnx.load(graph)
    made.metadata_props.add(key="loraformat.attached", value=record)
    save(made, graph)
    told = run("info", "m.onnx", "--json")
    assert told.code == 0
    assert all(entry["name"] is None for entry in told.json["attached"])
    assert run("info", "m.onnx").code == 0


def test_names_in_a_model_do_not_reach_the_terminal_as_they_are(run, tmp_path):
    made = model("g (float[N, 3] x) => (float[N, 5] y) <float[3, 5] w> { y = MatMul (x, w) }")
    made.graph.node[0].name = "\x1b[2J"
    made.producer_name = "a\nb"
    save(made, tmp_path / "m.onnx")
    told = run("info", "m.onnx")
    assert "\x1b" not in told.out
    assert r"by a\nb" in told.out


def test_a_checkpoint_is_described_by_its_architecture_dtypes_and_ties(run):
    path = base_of("llama")
    told = run("info", path, "--json")
    assert (told.code, told.err) == (0, "")
    found = told.json
    assert list(found) == [
        *("schema", "path", "kind", "architectures", "model_type", "tensors", "parameters", "bytes", "dtypes", "tied"),
        *("stored_head", "ties", "files"),
    ]
    stored = lf.open_base(path).parameters()
    assert (found["kind"], found["architectures"], found["model_type"]) == ("checkpoint", ["LlamaForCausalLM"], "llama")
    assert found["tensors"] == len(stored)
    values = sum(int(np.prod(p.shape)) for p in stored.values())
    assert (found["parameters"], found["bytes"]) == (values, 4 * values)
    assert found["dtypes"] == {"F32": {"tensors": len(stored), "values": values, "bytes": 4 * values}}
    assert (found["tied"], found["stored_head"]) == (False, "lm_head.weight")
    assert "LlamaForCausalLM" in run("info", path).out


def test_a_checkpoint_without_a_configuration_says_that_it_has_none(run):
    told = run("info", base_of("linear"))
    assert told.code == 0
    assert "no config.json says of what model" in told.out
    assert run("info", base_of("linear"), "--json").json["tied"] is None


def test_dtypes_are_listed_with_the_largest_first(run, tmp_path):
    save_file({"a": np.ones(3, np.float32), "b": np.ones((9, 9), np.int8)}, tmp_path / "m.safetensors")
    found = run("info", "m.safetensors", "--json").json
    assert list(found["dtypes"].items()) == [
        ("I8", {"tensors": 1, "values": 81, "bytes": 81}), ("F32", {"tensors": 1, "values": 3, "bytes": 12}),
    ]  # fmt: skip


def test_an_adapter_in_an_unknown_layout_is_not_taken_for_a_checkpoint(run, tmp_path):
    save_file({"blocks.0.lora_strange": np.ones((2, 3), np.float32)}, tmp_path / "k.safetensors")
    told = run("info", "k.safetensors")
    assert told.code == 1
    assert "LF-501  no known layout claims k.safetensors" in told.err


def test_what_is_neither_adapter_nor_base_is_told_so(run, tmp_path):
    (tmp_path / "README.md").write_text("# Read me")
    told = run("info", "README.md")
    assert told.code == 1
    assert "LF-501  no known layout claims README.md" in told.err
    assert "LF-601  README.md is none of the known kinds of base" in told.err


def test_a_folder_around_an_adapter_names_the_adapter(run, tmp_path):
    """As the cache of a hub has it: a folder of snapshots whose files are links."""
    snapshot = tmp_path / "models--x/snapshots/0a1b"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x/blobs").mkdir()
    for i, file in enumerate(adapter_of("gpt2").iterdir()):
        (tmp_path / f"models--x/blobs/{i}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    told = run("info", "models--x")
    assert told.code == 1
    assert "in it lies models--x/snapshots/0a1b" in told.err
    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "base.safetensors")
    merging = ["merge", "models--x", "--into", "base.safetensors", "-o", "out.safetensors"]
    for words in (merging, ["convert", "models--x", "to.safetensors"]):
        told = run(*words)
        assert told.code == 1
        assert "LF-501  models--x itself is no adapter; in it lies models--x/snapshots/0a1b" in told.err
    assert run("info", "models--x/snapshots/0a1b").code == 0


def test_json_of_a_fault_is_json(run, tmp_path):
    told = run("info", "nothing.onnx", "--json")
    assert (told.code, told.err) == (1, "")
    assert json.loads(told.out)["problems"][0]["rule"] == "LF-701"


def test_names_that_mean_another_tensor_are_told(run, monkeypatch):
    from loraformat.checkpoint import Checkpoint
    from loraformat.description import describe_checkpoint

    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    monkeypatch.setattr(Checkpoint, "describe", lambda self: describe_checkpoint(self.parameters(), {}, [], ties))
    assert run("info", base_of("linear"), "--json").json["ties"] == ties
    assert "lm_head.weight is model.embed_tokens.weight" in run("info", base_of("linear")).out


def test_a_folder_of_models_is_described_model_by_model(run, graph, tmp_path):
    (tmp_path / "pipe").mkdir()
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        (tmp_path / "pipe" / name).write_bytes(graph.read_bytes())
    told = run("info", "pipe", "--json")
    assert (told.code, told.err) == (0, "")
    assert told.json["kind"] == "onnx-folder"
    assert told.json["models"].keys() == {"encoder_model.onnx", "decoder_model.onnx"}
    assert sorted(told.json["components"][""]) == sorted(told.json["models"])
    assert told.json["models"]["encoder_model.onnx"]["inputs"][0]["name"] == "x"
    assert "pipe/encoder_model.onnx: ONNX model" in run("info", "pipe").out
    assert run("info", "pipe", "--how", "python").code == 2
