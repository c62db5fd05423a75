"""Merges into models in GGUF: floats rounded once, blocks quantised as the package gguf does it, every other byte as it was."""

import ml_dtypes
import numpy as np
import pytest
from gguf_goldens import HERE, file_of, truth_of
from refused import problems_of
from safetensors.numpy import load_file
from updates import normal

import loraformat as lf
from loraformat import Adapter, Lora, Update
from loraformat_converters.gguf import store
from loraformat_converters.gguf.blocks import QUANTISED
from loraformat_converters.gguf.cursor import Value
from loraformat_converters.gguf.file import GgufFile

OUT, IN = 37, 96


def change(size, key="blk.0.attn_q.weight", out=OUT, in_=IN):
    part = Lora(normal(2, in_, seed=1), normal(out, 2, seed=2) * np.float32(size), 1.0, "factor")
    return Adapter({key: Update((part,))}, "gguf")


def differing(one, other):
    """The tensors whose bytes differ; that nothing else in the two files does is asserted."""
    before, after = GgufFile(one), GgufFile(other)
    old, new = bytearray(one.read_bytes()), bytearray(other.read_bytes())
    assert (before.infos, len(old)) == (after.infos, len(new))
    found = {n for n, i in before.infos.items() if old[i.start : i.stop] != new[i.start : i.stop]}
    for name in found:
        info = before.infos[name]
        old[info.start : info.stop] = new[info.start : info.stop]
    assert old == new
    return found


def quantised(path, kind):
    """A model that the package gguf wrote: one quantised matrix between two of floats."""
    gguf = pytest.importorskip("gguf", reason="needs the peer gguf")
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", normal(11, 32))
    if kind in QUANTISED:
        data = gguf.quants.quantize(normal(OUT, IN), number)
    else:
        width = gguf.GGML_QUANT_SIZES[number][1]
        data = np.zeros((5, width), np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=number)
    writer.add_tensor("output.weight", normal(11, 32, seed=1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf, number, data


@pytest.mark.parametrize("case", ["llama", "mixtral", "phi3"])
def test_what_changes_is_what_peft_changes_and_nothing_else(case, tmp_path):
    path, truth = HERE / case / "base.gguf", truth_of(case)
    base, adapter = lf.open_base(path), lf.load(file_of(case))
    lf.merge(adapter, base, tmp_path / "out.gguf")
    assert differing(path, tmp_path / "out.gguf") == set(truth)
    merged = lf.open_base(tmp_path / "out.gguf")
    for name, delta in truth.items():
        moved = merged.read(name).astype(np.float64) - base.read(name)
        assert np.linalg.norm(moved - delta) <= 1e-6 * np.linalg.norm(base.read(name)), name
    assert lf.verify(base, adapter, merged).problems == []


@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_are_those_that_gguf_makes_of_the_sum(kind, tmp_path):
    gguf, number, data = quantised(tmp_path / "m.gguf", kind)
    base, adapter = lf.open_base(tmp_path / "m.gguf"), change(0.3)
    outcome = lf.merge(adapter, base, tmp_path / "out.gguf", requantize=True)
    assert differing(tmp_path / "m.gguf", tmp_path / "out.gguf") == {"blk.0.attn_q.weight"}
    old, delta = gguf.quants.dequantize(data, number), adapter["blk.0.attn_q.weight"].matrix()
    wanted = gguf.quants.quantize((old + delta).astype(np.float32), number)
    (read,) = [t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == "blk.0.attn_q.weight"]
    assert np.array_equal(read.data, wanted)
    new = gguf.quants.dequantize(wanted, number)
    norms = outcome.norms["blk.0.attn_q.weight"]
    assert norms.loss == pytest.approx(np.linalg.norm(new - old - delta) / np.linalg.norm(delta), rel=1e-5)
    assert 0.001 < norms.loss < 0.5
    merged = lf.open_base(tmp_path / "out.gguf")
    assert lf.verify(base, adapter, merged).problems == []
    (problem,) = lf.verify(base, adapter, base).problems
    assert "rounded to the steps of their scale" in problem.what


@pytest.mark.parametrize("kind", QUANTISED)
def test_where_nothing_changes_no_byte_does(kind, tmp_path):
    quantised(tmp_path / "m.gguf", kind)
    part = Lora(normal(1, IN), np.eye(OUT, 1, dtype=np.float32), 1.0, "factor")  # of the first row alone
    adapter = Adapter({"blk.0.attn_q.weight": Update((part,))}, "gguf")
    lf.merge(adapter, lf.open_base(tmp_path / "m.gguf"), tmp_path / "out.gguf", requantize=True)
    one, other = GgufFile(tmp_path / "m.gguf"), GgufFile(tmp_path / "out.gguf")
    rows = [file.stored("blk.0.attn_q.weight") for file in (one, other)]
    assert np.array_equal(rows[0][1:], rows[1][1:])
    assert not np.array_equal(rows[0][0], rows[1][0])


def test_blocks_are_not_rounded_to_unasked_nor_swallow_a_change(tmp_path):
    quantised(tmp_path / "m.gguf", "Q4_0")
    base = lf.open_base(tmp_path / "m.gguf")
    (problem,) = problems_of(lf.merge, change(0.3), base, tmp_path / "out.gguf")
    assert (problem.rule, "--requantize" in problem.fix) == ("LF-608", True)
    (problem,) = problems_of(lf.merge, change(1e-4), base, tmp_path / "out.gguf", requantize=True)
    assert problem.rule == "LF-615"
    assert "of ΔW survives in Q4_0" in problem.what
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_NL"])
def test_types_that_only_llama_cpp_quantises_to_are_refused_by_name(kind, tmp_path):
    quantised(tmp_path / "m.gguf", kind)
    base = lf.open_base(tmp_path / "m.gguf")
    out, in_ = base.parameters()["blk.0.attn_q.weight"].shape
    adapter = change(0.3, out=out, in_=in_)
    (problem,) = problems_of(lf.merge, adapter, base, tmp_path / "out.gguf", requantize=True)
    assert problem.rule == "LF-608"
    assert problem.what == f"blk.0.attn_q.weight is quantised as {kind}, to which only llama.cpp rounds"
    assert "llama-quantize" in problem.fix
    assert "--lora" in problem.fix


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_floats_are_rounded_once(dtype, tmp_path):
    stored = normal(OUT, IN).astype(dtype)
    with open(tmp_path / "m.gguf", "wb") as file:
        store.write(file, {"general.architecture": Value("str", "llama")}, {"blk.0.attn_q.weight": stored})
    adapter = change(0.3)
    lf.merge(adapter, lf.open_base(tmp_path / "m.gguf"), tmp_path / "out.gguf")
    found = lf.open_base(tmp_path / "out.gguf").read("blk.0.attn_q.weight")
    wanted = (stored.astype(np.float32) + adapter["blk.0.attn_q.weight"].matrix()).astype(stored.dtype)
    assert np.mean(found == wanted) > 0.999  # sums of another order may end on the other side of a tie
    assert np.allclose(found.astype(np.float32), wanted.astype(np.float32), rtol=2**-7)


def test_several_are_merged_one_after_the_other(tmp_path):
    path = HERE / "llama" / "base.gguf"
    adapter, base = lf.load(file_of("llama")), lf.open_base(path)
    lf.merge([(adapter, 0.5), (adapter, -0.5)], base, tmp_path / "out.gguf")
    merged = lf.open_base(tmp_path / "out.gguf")
    for name in adapter:
        assert np.allclose(merged.read(name), base.read(name), atol=1e-6)


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    path = HERE / "llama" / "base.gguf"
    base, adapter = lf.open_base(path), lf.load(file_of("llama"))
    assert [p.rule for p in problems_of(lf.merge, adapter, base, tmp_path / "out.bin")] == ["LF-703"]
    new = Update((lf.Replace(normal(99, 5), ("resize",)),))
    grown = Adapter({"output.weight": new}, "gguf")
    assert [p.rule for p in problems_of(lf.merge, grown, base, tmp_path / "out.gguf")] == ["LF-608"]
    whole = GgufFile(path)
    with open(tmp_path / "tied.gguf", "wb") as file:
        store.write(file, whole.metadata, {n: t for n, t in whole.items() if n != "output.weight"})
    lone = Adapter({"token_embd.weight": adapter["token_embd.weight"]}, "gguf")
    tied = lf.open_base(tmp_path / "tied.gguf")
    assert [p.rule for p in problems_of(lf.merge, lone, tied, tmp_path / "out.gguf")] == ["LF-609"]
    assert not (tmp_path / "out.gguf").exists()


def test_what_lies_between_two_models_is_taken_out(tmp_path):
    quantised(tmp_path / "m.gguf", "Q8_0")
    base, adapter = lf.open_base(tmp_path / "m.gguf"), change(0.3)
    lf.merge(adapter, base, tmp_path / "out.gguf", requantize=True)
    found = lf.extract(base, lf.open_base(tmp_path / "out.gguf"), rank=2)
    assert found.adapter.names == "gguf"
    assert set(found.adapter) == set(adapter)
    (key,) = adapter
    wanted = adapter[key].matrix()
    assert np.linalg.norm(found.adapter[key].matrix() - wanted) < 0.02 * np.linalg.norm(wanted)


def test_experts_embeddings_norms_and_biases(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the peer gguf")
    number = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, shape in (("blk.0.ffn_up_exps.weight", (3, 8, 64)), ("token_embd.weight", (11, 64))):
        writer.add_tensor(name, gguf.quants.quantize(normal(*shape), number), raw_dtype=number)
    for name, shape in (("output.weight", (11, 64)), ("blk.0.attn_norm.weight", (64,)), ("blk.0.attn_q.bias", (8,))):
        writer.add_tensor(name, normal(*shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    experts = Update((Lora(normal(3, 2, 64, seed=1), normal(3, 8, 2, seed=2), 0.3, "factor"),))
    embedding = Update((Lora(normal(2, 11, seed=1), normal(64, 2, seed=2), 0.3, "factor"),), op="embedding")
    norm, bias = Update((lf.Delta(normal(64, seed=1)),)), Update((lf.Replace(normal(8, seed=1)),))
    keys = ("blk.0.ffn_up_exps.weight", "token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.bias")
    adapter = Adapter(dict(zip(keys, (experts, embedding, norm, bias), strict=True)), "gguf")
    base = lf.open_base(tmp_path / "m.gguf")
    lf.merge(adapter, base, tmp_path / "out.gguf", requantize=True)
    merged = lf.open_base(tmp_path / "out.gguf")
    moved = {key: merged.read(key).astype(np.float64) - base.read(key) for key in keys}
    for key, delta in ((keys[0], experts.matrix()), (keys[1], embedding.matrix().T), (keys[2], normal(64, seed=1))):
        assert np.linalg.norm(moved[key] - delta) < 0.03 * np.linalg.norm(delta), key
    assert np.array_equal(merged.read(keys[3]), normal(8, seed=1))
    assert lf.verify(base, adapter, merged).problems == []
    new = Adapter({keys[1]: Update((lf.Replace(normal(11, 64, seed=5)),))}, "gguf")
    (problem,) = problems_of(lf.merge, new, base, tmp_path / "new.gguf", requantize=True)
    assert (problem.rule, "only a sum is rounded" in problem.what) == ("LF-608", True)


def test_types_that_are_only_read_are_compared_by_their_values(tmp_path):
    quantised(tmp_path / "m.gguf", "Q4_K")
    base = lf.open_base(tmp_path / "m.gguf")
    out, in_ = base.parameters()["blk.0.attn_q.weight"].shape
    adapter = change(0.3, out=out, in_=in_)
    key = "blk.0.attn_q.weight"
    with open(tmp_path / "tuned.gguf", "wb") as file:
        kept = {n: base.read(n) for n in base.parameters() if n != key}
        store.write(file, {"general.architecture": Value("str", "llama")}, kept | {key: adapter[key].matrix()})
    found = lf.extract(base, lf.open_base(tmp_path / "tuned.gguf"), rank=2)  # the blocks are all zero
    assert np.allclose(found.adapter[key].matrix(), adapter[key].matrix(), atol=1e-5)


def test_the_command_merges_and_verifies(run, tmp_path):
    quantised(tmp_path / "m.gguf", "Q8_0")
    lf.save(change(0.3), tmp_path / "a.lora.safetensors")
    words = ("merge", "a.lora.safetensors", "--into", "m.gguf", "-o", "out.gguf", "--requantize")
    told = run(*words, "--plan")
    assert told.code == 0, told.err
    assert "merge blk.0.attn_q.weight Q8_0 [37, 96]" in told.out
    assert "of ΔW survives about" in told.out
    told = run(*words, "--verify")
    assert told.code == 0, told.err
    assert "out.gguf: equals base + adapter" in told.err


@pytest.mark.peer
@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen2"])
def test_llama_cpp_computes_pefts_probabilities_with_the_merged_model(case, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the peer xllamacpp")
    from test_gguf_loads import by_peft, log_probabilities

    truth = load_file(HERE / case / "truth.safetensors")
    lf.convert(HERE / case / "peft", tmp_path / "a.gguf", base=HERE / case / "base.gguf")
    lf.merge(lf.load(tmp_path / "a.gguf"), lf.open_base(HERE / case / "base.gguf"), tmp_path / "out.gguf")
    found = log_probabilities(tmp_path / "out.gguf", truth["x"][0])
    assert np.abs(found - by_peft(truth, "y")).max() <= 1e-5
    assert np.abs(found - by_peft(truth, "y_base")).max() > 1e-2
