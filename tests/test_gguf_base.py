"""A model in GGUF as a base: what an adapter needs to know of it."""

import numpy as np
import pytest
from gguf_goldens import CASES, HERE, file_of, truth_of
from refused import problems_of

import loraformat as lf
from loraformat import Adapter, testing
from loraformat.base import Options
from loraformat_converters.gguf import store
from loraformat_converters.gguf.cursor import Value
from loraformat_converters.gguf.file import GgufFile

MODELS = [case for case in CASES if (HERE / case / "base.gguf").is_file()]


def model_of(case):
    return lf.open_base(HERE / case / "base.gguf")


@pytest.mark.parametrize("case", MODELS)
def test_the_model_alone_tells_names_heads_and_experts(case, tmp_path):
    """Instead of the config.json: PEFT to GGUF with the GGUF model as the base."""
    lf.convert(HERE / case / "peft", tmp_path / "a.gguf", base=HERE / case / "base.gguf")
    testing.check_golden(lf.load(tmp_path / "a.gguf"), truth_of(case))


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3"])
def test_and_the_way_back(case, tmp_path):
    lf.convert(file_of(case), tmp_path / "peft", to_layout="peft", base=HERE / case / "base.gguf")
    again, ours = lf.load(tmp_path / "peft"), lf.load(HERE / case / "peft")
    assert again.keys() == ours.keys()
    for key, update in ours.items():
        assert np.array_equal(again[key].matrix(), update.matrix()), key


def test_values_and_shapes_are_those_of_the_file():
    base = model_of("llama")
    stored = GgufFile(HERE / "llama" / "base.gguf")
    assert {name: p.shape for name, p in base.parameters().items()} == {n: t.shape for n, t in stored.items()}
    for name in ("token_embd.weight", "output_norm.weight"):
        assert np.array_equal(base.read(name), stored[name])
        assert np.array_equal(base.read(name, (3, 7)), stored[name][3:7])
    assert base.config["num_key_value_heads"] == 2
    assert base.config["tie_word_embeddings"] is False


def test_quantised_values_are_those_of_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the peer gguf")
    whole = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    for kind in ("Q8_0", "Q4_0", "Q5_1", "Q6_K" if hasattr(gguf.quants.Q6_K, "quantize_rows") else "Q4_1"):
        number = gguf.GGMLQuantizationType[kind]
        try:
            data = gguf.quants.quantize(whole, number)
        except NotImplementedError:
            continue
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_tensor("output.weight", data, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        base = lf.open_base(tmp_path / "m.gguf")
        wanted = gguf.quants.dequantize(data, number)
        assert base.parameters()["output.weight"].dtype == kind
        assert np.array_equal(base.read("output.weight"), wanted)
        assert np.array_equal(base.read("output.weight", (2, 5)), wanted[2:5])


def test_targets_are_found_by_name_and_placed_as_ggml_multiplies():
    base, adapter = model_of("llama"), lf.load(file_of("llama"))
    found = base.resolve(adapter, lf.Hints()).require()
    places = {key: matches[0].placement for key, matches in found.targets.items()}
    assert places == {key: update.placement for key, update in adapter.items()}
    other = Adapter({"blk.7.attn_q.weight": adapter["blk.0.attn_q.weight"]}, "gguf")
    (problem,) = problems_of(base.resolve(other, lf.Hints()).require)
    assert problem.rule == "LF-602"
    assert "blk.0.attn_q.weight" in problem.what
    wrong = Adapter({"blk.0.attn_v.weight": adapter["blk.0.attn_q.weight"]}, "gguf")
    assert {p.rule for p in problems_of(base.resolve(wrong, lf.Hints()).require)} == {"LF-606"}


def test_nothing_is_attached_to_it(run, tmp_path):
    (problem,) = problems_of(model_of("llama").plan, "attach", [], Options(tmp_path / "out"))
    assert problem.rule == "LF-608"
    assert "--lora" in problem.fix
    done = run("attach", file_of("llama"), "--to", HERE / "llama" / "base.gguf", "-o", "out.gguf")
    assert done.code == 1
    assert "LF-608" in done.err
    assert not (tmp_path / "out.gguf").exists()


def test_info_describes_it_and_an_adapter_is_no_base(run, tmp_path):
    told = run("info", HERE / "mixtral" / "base.gguf", "--json").json
    assert (told["kind"], told["architecture"]) == ("gguf", "llama")
    assert told["config"]["num_local_experts"] == 3
    (problem,) = problems_of(lf.open_base, file_of("llama"))
    assert problem.rule == "LF-601"


def test_an_embedding_whose_tensor_is_the_head_too_is_refused(tmp_path):
    """llama.cpp stops at an assertion when it multiplies by it."""
    whole = GgufFile(HERE / "llama" / "base.gguf")
    with open(tmp_path / "tied.gguf", "wb") as file:
        store.write(file, whole.metadata, {n: t for n, t in whole.items() if n != "output.weight"})
    lone = lf.load(file_of("llama"))
    targets = {"token_embd.weight": lone["token_embd.weight"]}
    lf.save(Adapter(targets, "gguf"), tmp_path / "a.lora.safetensors")
    problems = problems_of(
        lf.convert, tmp_path / "a.lora.safetensors", tmp_path / "a.gguf", base=tmp_path / "tied.gguf"
    )
    assert [(p.rule, p.where) for p in problems] == [("LF-508", "token_embd.weight")]
    lf.convert(tmp_path / "a.lora.safetensors", tmp_path / "a.gguf", base=HERE / "llama" / "base.gguf")


def test_metadata_of_other_types_tells_nothing(tmp_path):
    head = {"general.architecture": Value("str", "llama"), "llama.attention.head_count": Value("[i32]", [4, 2])}
    with open(tmp_path / "m.gguf", "wb") as file:
        store.write(file, head, {"output.weight": np.ones((3, 5), np.float32)})
    assert "num_attention_heads" not in lf.open_base(tmp_path / "m.gguf").config


def test_a_new_adapter_has_its_names():
    fresh = lf.init(model_of("llama"), ["attn_q"], rank=2, alpha=4)
    assert (fresh.names, "blk.0.attn_q.weight" in fresh) == ("gguf", True)
