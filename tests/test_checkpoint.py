"""Checkpoints in a folder: shards, index, everything else; and what a hostile folder is told."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat.base import Options
from loraformat.checkpoint import folder
from loraformat.verbs.merge import prepare

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BF16 = ml_dtypes.bfloat16


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensors():
    return {
        SHARDS[0]: {"a.weight": draw(7, 5).astype(BF16), "n.weight": draw(9, seed=1).astype(BF16)},
        SHARDS[1]: {"b.weight": draw(6, 8, seed=2).astype(np.float16), "steps": np.arange(4), "c.weight": draw(3, 4)},
    }


@pytest.fixture
def base(tmp_path):
    """Two shards of several dtypes, an index, a configuration, and what else lies in such a folder."""
    home = tmp_path / "base"
    home.mkdir()
    for name, held in tensors().items():
        save_file(held, home / name, {"format": "pt"})
    homes = {tensor: name for name, held in tensors().items() for tensor in held}
    total = sum(t.nbytes for held in tensors().values() for t in held.values())
    (home / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": homes}))
    (home / "config.json").write_text('{"model_type": "llama", "rope_theta": 1e4}')
    (home / "tokenizer.json").write_text("{}")
    (home / "1_Pooling").mkdir()
    (home / "1_Pooling" / "config.json").write_text('{"dim": 5}')
    (home / ".git").mkdir()
    (home / ".git" / "HEAD").write_text("ref")
    (home / "pytorch_model.bin").write_bytes(b"the same weights, in another form")
    return home


def lora(out, in_, seed=3):
    return lf.Update((lf.Lora(draw(2, in_, seed=seed), draw(out, 2, seed=seed + 1), 3.0, "alpha/r"),))


ADAPTER = lf.Adapter({"a.weight": lora(7, 5), "b.weight": lora(6, 8, 5)})


def plan(adapter, base, out):
    opened = lf.open_base(base)
    return opened, prepare("merge", [("default", adapter)], opened, Options(out))


def faults(call, *args):
    with pytest.raises(lf.LoraFormatError) as caught:
        call(*args)
    return [(p.rule, p.where) for p in caught.value.problems]


def merge(adapter, base, out):
    lf.merge(adapter, lf.open_base(base), out)
    return lf.open_base(out)


def content(home):
    return {p.relative_to(home).as_posix(): p.read_bytes() for p in home.rglob("*") if p.is_file()}


def rewrite(base, **changes):
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps({**index, **changes}))
    return index


# What is written.


def test_a_merged_folder_is_complete_and_only_the_targets_differ(base, tmp_path):
    opened, planned = plan(ADAPTER, base, tmp_path / "out")
    opened.apply(planned)
    before, after = content(base), content(tmp_path / "out")
    assert before.keys() - after.keys() == {".git/HEAD", "pytorch_model.bin"}
    assert planned.notes == ("not taken along, as these hold the unmerged weights: pytorch_model.bin",)
    assert {name for name in after if after[name] != before[name]} == set(SHARDS)
    assert planned.writes == sum(map(len, after.values()))
    for shard, held in tensors().items():
        merged = load_file(tmp_path / "out" / shard)
        assert merged.keys() == held.keys()
        for name, old in held.items():
            wanted = old
            if name in ADAPTER:
                wanted = ADAPTER[name].placed(lf.Placement.of(old.shape, "out,in")).apply(old).astype(old.dtype)
            assert merged[name].dtype == old.dtype
            assert merged[name].tobytes() == wanted.tobytes(), name


def test_an_existing_output_is_replaced_as_a_whole(base, tmp_path):
    lf.merge(ADAPTER, lf.open_base(base), tmp_path / "out")
    first = content(tmp_path / "out")
    half = lf.Adapter({"a.weight": ADAPTER["a.weight"]})
    lf.merge(half, lf.open_base(base), tmp_path / "out", force=True)
    second = content(tmp_path / "out")
    assert {name for name in first if first[name] != second[name]} == {SHARDS[1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_an_added_tensor_and_a_resized_one_are_in_header_and_index(base, tmp_path):
    place = lf.Placement((9, 8), (0,), (1,))
    adapter = lf.Adapter(
        {
            "b.weight": lf.Update((lf.Replace(draw(9, 8, seed=8), ("resize",)),), place),
            "score.weight": lf.Update((lf.Replace(draw(2, 5, seed=9), ("add",)),)),
        }
    )
    lf.merge(adapter, lf.open_base(base), tmp_path / "out")
    assert lf.verify(lf.open_base(base), adapter, lf.open_base(tmp_path / "out")).problems == []
    merged = load_file(tmp_path / "out" / SHARDS[1])
    assert np.array_equal(merged["b.weight"], draw(9, 8, seed=8).astype(np.float16))
    assert np.array_equal(merged["score.weight"], draw(2, 5, seed=9))
    assert np.array_equal(merged["c.weight"], tensors()[SHARDS[1]]["c.weight"])
    assert np.array_equal(merged["steps"], np.arange(4))
    old, new = (json.loads((home / INDEX).read_text()) for home in (base, tmp_path / "out"))
    assert new["weight_map"] == old["weight_map"] | {"score.weight": SHARDS[1]}
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + 3 * 8 * 2 + 2 * 5 * 4
    assert content(base)[SHARDS[0]] == content(tmp_path / "out")[SHARDS[0]]


def test_a_replacement_of_another_size_needs_leave(base, tmp_path):
    adapter = lf.Adapter({"b.weight": lf.Update((lf.Replace(draw(9, 8)),))})
    assert faults(plan, adapter, base, tmp_path / "out") == [("LF-606", "b.weight")]


def test_several_adapters_are_applied_one_after_the_other_with_their_weights(base, tmp_path):
    second = lf.Adapter({"a.weight": lora(7, 5, 20)})
    lf.merge([(ADAPTER, 0.5), (second, -2.0)], lf.open_base(base), tmp_path / "out")
    old = tensors()[SHARDS[0]]["a.weight"]
    wanted = old.astype(np.float32) + 0.5 * ADAPTER["a.weight"].matrix() - 2.0 * second["a.weight"].matrix()
    found = load_file(tmp_path / "out" / SHARDS[0])["a.weight"].astype(np.float32)
    assert np.abs(found - wanted).max() <= 2.0**-8 * np.abs(wanted).max()
    opened = lf.open_base(tmp_path / "out")
    assert lf.verify(lf.open_base(base), [(ADAPTER, 0.5), (second, -2.0)], opened).problems == []
    assert lf.verify(lf.open_base(base), [(ADAPTER, 0.5), (second, 2.0)], opened).problems != []


def test_a_float64_base_loses_nothing_where_the_adapter_does_nothing(tmp_path):
    old = np.random.default_rng(0).standard_normal((7, 5))
    save_file({"w": old}, tmp_path / "base.safetensors")
    pair = lf.Lora(np.zeros((2, 5), np.float32), draw(7, 2), 1.0, "alpha/r")
    lf.merge(lf.Adapter({"w": lf.Update((pair,))}), lf.open_base(tmp_path / "base.safetensors"), tmp_path / "out")
    assert np.array_equal(load_file(tmp_path / "out")["w"], old)


@pytest.mark.parametrize("spec", ["out,in", "in,out"])
def test_dora_of_every_orientation_is_the_same_in_tiles_and_whole(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("loraformat.tiles._TILE", 16)
    old = draw(9, 8)
    place = lf.Placement.of(old.shape, spec)
    out, in_ = place.matrix_shape
    parts = (*lora(out, in_).parts, lf.Magnitude(np.abs(draw(out, seed=4)) + 1))
    adapter = lf.Adapter({"w": lf.Update(parts, place)})
    save_file({"w": old}, tmp_path / "base.safetensors")
    lf.merge(adapter, lf.open_base(tmp_path / "base.safetensors"), tmp_path / "out")
    assert np.allclose(load_file(tmp_path / "out")["w"], adapter["w"].apply(old), rtol=1e-6)


def test_one_file_of_weights_in_a_folder_may_be_written_alone(base, tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    save_file({n: t for held in tensors().values() for n, t in held.items()}, single / "model.safetensors")
    lf.merge(ADAPTER, lf.open_base(single), tmp_path / "out.safetensors")
    lf.merge(ADAPTER, lf.open_base(single), tmp_path / "out")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert faults(plan, ADAPTER, base, tmp_path / "o.safetensors") == [("LF-703", "")]


def test_the_output_is_never_in_the_base(base):
    assert faults(plan, ADAPTER, base, base / "merged") == [("LF-703", "")]


def test_a_disk_without_room_is_told_before_the_first_byte(base, tmp_path, monkeypatch):
    opened, planned = plan(ADAPTER, base, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    assert faults(opened.apply, planned) == [("LF-703", "")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


# The folder of the hub's cache: every file is a link to a blob beside the snapshots.


def test_a_snapshot_of_the_hub_is_read_and_written_as_plain_files(base, tmp_path):
    repo = tmp_path / "models--x"
    (repo / "snapshots").mkdir(parents=True)
    shutil.copytree(base, repo / "blobs")
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir()
    for name in (*SHARDS, INDEX, "config.json", "tokenizer.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    lf.merge(ADAPTER, lf.open_base(snapshot), tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# Hostile or broken folders.


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..", "", "a\\b", "x\0y", "./m"])
def test_an_index_that_leaves_the_folder_is_refused(name, base, tmp_path):
    shutil.copy(base / SHARDS[0], tmp_path / "secret.safetensors")
    rewrite(base, weight_map={"a.weight": name, "n.weight": name})
    assert [rule for rule, _ in faults(lf.open_base, base)] == ["LF-610"]


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json", "config.json", INDEX, "1_Pooling/config.json", "more"])
def test_a_link_out_of_the_folder_is_refused(name, base, tmp_path):
    (tmp_path / "secret").write_bytes((base / name).read_bytes() if (base / name).exists() else b"{}")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    assert [rule for rule, _ in faults(lf.open_base, base)] == ["LF-610"]


def test_a_linked_folder_and_a_pipe_are_refused(base, tmp_path):
    (base / "etc").symlink_to("/etc")
    os.mkfifo(base / "pipe")
    assert faults(lf.open_base, base) == [("LF-610", "etc"), ("LF-610", "pipe")]


def test_every_contradiction_between_index_and_shards_is_named_at_once(base):
    index = json.loads((base / INDEX).read_text())["weight_map"]
    del index["n.weight"]
    rewrite(base, weight_map={**index, "ghost": SHARDS[0], "steps": SHARDS[0]})
    found = faults(lf.open_base, base)
    assert sorted(found) == [("LF-610", "ghost"), ("LF-610", "n.weight"), ("LF-610", "steps"), ("LF-610", "steps")]


def test_a_tensor_that_two_shards_hold_is_refused(base):
    held = tensors()[SHARDS[1]]
    save_file({**held, "a.weight": draw(7, 5)}, base / SHARDS[1])
    assert faults(lf.open_base, base) == [("LF-610", "a.weight")]


def test_missing_and_damaged_shards_are_all_named(base):
    (base / SHARDS[0]).unlink()
    (base / SHARDS[1]).write_bytes(b"\xff" * 40)
    assert faults(lf.open_base, base) == [("LF-610", SHARDS[0]), ("LF-102", SHARDS[1])]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_an_index_that_is_none_is_refused(text, base):
    (base / INDEX).write_text(text, encoding="latin-1")
    assert [rule for rule, _ in faults(lf.open_base, base)] == ["LF-610"]


def test_a_tensor_of_integers_is_no_target(base, tmp_path):
    adapter = lf.Adapter({"steps": lf.Update((lf.Delta(np.ones(4, np.float32)),), lf.Placement((4,), (0,), ()))})
    assert faults(plan, adapter, base, tmp_path / "out") == [("LF-608", "steps")]


LARGE = np.array([2**24 + 1, 2**53 + 1, -(2**62) - 1, 3])


def test_a_counter_that_is_replaced_is_exact(base, tmp_path):
    adapter = lf.Adapter({"steps": lf.Update((lf.Replace(LARGE),))})
    merged = merge(adapter, base, tmp_path / "out")
    assert np.array_equal(load_file(tmp_path / "out" / SHARDS[1])["steps"], LARGE)
    assert not lf.verify(lf.open_base(base), adapter, merged).problems
    with open(tmp_path / "out" / SHARDS[1], "r+b") as file:  # off by one in 2^62: float32 would not see it
        data = file.read()
        place = data.index(LARGE.tobytes())
        file.seek(place + 16)
        file.write(np.int64(LARGE[2] + 1).tobytes())
    (problem,) = lf.verify(lf.open_base(base), adapter, lf.open_base(tmp_path / "out")).problems
    assert "1 of 4 values" in problem.what


def test_what_replaces_a_counter_is_of_its_type_or_exact_in_it(base, tmp_path):
    merge(lf.Adapter({"steps": lf.Update((lf.Replace(np.float32([1, 2, 3, 4])),))}), base, tmp_path / "out")
    assert load_file(tmp_path / "out" / SHARDS[1])["steps"].tolist() == [1, 2, 3, 4]
    half = lf.Adapter({"steps": lf.Update((lf.Replace(np.float32([1, 2, 3, 4.5])),))})
    assert faults(plan, half, base, tmp_path / "other") == [("LF-608", "steps")]


def test_a_tensor_without_axes_is_changed_by_what_it_was(tmp_path):
    save_file({"scale": np.array(2.5, np.float32), "count": np.array(7)}, tmp_path / "base.safetensors")
    delta = lf.Update((lf.Delta(np.float32([0.25])),), lf.Placement((), (), ()))
    adapter = lf.Adapter({"scale": delta, "count": lf.Update((lf.Replace(np.array(2**60 + 1)),))})
    outcome = lf.merge(adapter, lf.open_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert (merged["scale"].item(), merged["count"].item()) == (2.75, 2**60 + 1)
    assert outcome.norms["scale"].change == pytest.approx(0.1)


@pytest.mark.parametrize(("dtype", "size"), [(np.float16, 70_000), (np.float32, 3e38), (BF16, 3e38)])
def test_a_value_beyond_the_range_of_its_type_is_refused_and_nothing_written(dtype, size, base, tmp_path):
    save_file({"w": np.full((4, 6), 0.75 * min(size, 3e38), np.float64).astype(dtype)}, base / SHARDS[0])
    pair = lf.Lora(np.full((1, 6), 1.0, np.float32), np.full((4, 1), size, np.float32), 1.0, "factor")
    adapter, only = lf.Adapter({"w": lf.Update((pair,))}), lf.open_base(base / SHARDS[0])
    assert faults(lf.merge, adapter, only, tmp_path / "out.safetensors") == [("LF-611", "w")]
    assert not list(tmp_path.glob("*out*"))


def test_a_float64_weight_is_merged_and_verified_in_float64(tmp_path):
    old = np.random.default_rng(0).standard_normal((7, 5))
    save_file({"a.weight": old}, tmp_path / "base.safetensors")
    adapter, opened = lf.Adapter({"a.weight": lora(7, 5)}), lf.open_base(tmp_path / "base.safetensors")
    lf.merge(adapter, opened, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")["a.weight"]
    np.testing.assert_allclose(merged, old + adapter["a.weight"].matrix(), atol=1e-6)
    assert (merged - merged.astype(np.float32)).any()
    verdict = lf.verify(opened, adapter, lf.open_base(tmp_path / "out.safetensors"))
    assert (verdict.problems, verdict.touched) == ([], {"a.weight": 0.0})


def test_what_is_infinite_in_the_base_is_none_of_the_adapters_faults(tmp_path):
    mask = np.float16([[-np.inf, 1], [0, np.nan]])
    save_file({"w": mask}, tmp_path / "base.safetensors")
    adapter = lf.Adapter({"w": lf.Update((lf.Delta(np.ones((2, 2), np.float32)),), lf.Placement.of((2, 2), "out,in"))})
    lf.merge(adapter, lf.open_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")["w"], mask + 1)


def test_other_forms_of_the_weights_are_known_by_name():
    named = ("tf_model.h5", "model.fp16.safetensors", "onnx/model.onnx", "x.gguf", "original/params.json")
    kept = ("training_args.bin", "2_Dense/model.safetensors", "vocab.txt", "merges.txt")
    fits = [n for n in named + kept if any(folder.fits(n, p) for p in folder._OTHER_FORMS)]
    assert fits == list(named)
