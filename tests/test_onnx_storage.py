"""What is written where: external data, what a failure leaves behind, what ONNX Runtime folds away."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from functools import partial

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import adapter, lora, model, run, save, session, stored
from onnx import external_data_helper, helper

from loraformat import Adapter, LoraFormatError, atomic
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach
from loraformat.verbs.init import init
from loraformat.verbs.merge import attach, merge, prepare
from loraformat.verbs.verify import verify
from loraformat_converters.onnx.graph import store

KEYS = {"m.q.weight": (64, 48), "m.k.weight": (32, 64)}
TEXT = """g (float[T,N,48] x) => (float[T,N,40] y) <float[48,64] wq, float[64] bq, float[64,32] wk, float[32,40] wo>
  { ["/m/q/MatMul"] h = MatMul(x, wq)  s = Add(h, bq)  r = Relu(s)
    ["/m/k/MatMul"] t = MatMul(r, wk)  ["/m/o/MatMul"] y = MatMul(t, wo) }"""
VERBS = {"attach": attach, "merge": merge}
both_verbs = pytest.mark.parametrize("verb", VERBS)


def external(path, made=None, data="weights.bin"):
    """``path``, with a model whose weights lie in one file beside it."""
    made = made or model(TEXT)
    path.parent.mkdir(exist_ok=True)
    onnx.save_model(made, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def locations(path):
    """Name → location of every external tensor."""
    graph = onnx.load(path, load_external_data=False).graph
    return {t.name: e.value for t in graph.initializer for e in t.external_data if e.key == "location"}


def names_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def check(base, out, update):
    """``out`` computes with W + ΔW, and is sound where it lies."""
    kept = {n: v.astype(np.float64) for n, v in stored(base).items()}
    x = np.random.default_rng(4).standard_normal((4, 3, 48)).astype(np.float32)
    q, k = (update[key].matrix().T if key in update else 0 for key in KEYS)
    wanted = np.maximum(x @ (kept["wq"] + q) + kept["bq"], 0) @ (kept["wk"] + k) @ kept["wo"]
    assert relative_error(session(out).run(["y"], {"x": x})[0], wanted) <= 2e-6
    assert relative_error(session(base).run(["y"], {"x": x})[0], wanted) > 0.1
    onnx.checker.check_model(out, full_check=True)


def test_attach_beside_the_base_uses_its_data_file_and_writes_the_adapter_only(tmp_path):
    base, update = external(tmp_path / "base.onnx"), adapter(KEYS)
    before = digest(tmp_path / "weights.bin")
    outcome = attach(update, open_base(base), tmp_path / "out.onnx")
    assert names_in(tmp_path) == ["base.onnx", "out.onnx", "weights.bin"]
    assert digest(tmp_path / "weights.bin") == before
    assert set(locations(tmp_path / "out.onnx").values()) == {"weights.bin"}
    factors = sum(t.nbytes for u in update.values() for t in (u["lora"].lora_A, u["lora"].lora_B))
    assert outcome.written == (tmp_path / "out.onnx").stat().st_size <= base.stat().st_size + factors + 6000
    check(base, tmp_path / "out.onnx", update)


def test_what_attach_writes_does_not_grow_with_the_base(tmp_path):
    grown = {}
    for name, other in (("small", 40), ("large", 4000)):
        base = external(tmp_path / name / "base.onnx", model(TEXT.replace("40", str(other))))
        grown[name] = attach(adapter(KEYS), open_base(base), tmp_path / name / "out.onnx").grown
    assert abs(grown["small"] - grown["large"]) < 64


def test_attach_elsewhere_takes_the_data_along_under_a_name_of_its_own(tmp_path):
    base, update = external(tmp_path / "a" / "base.onnx"), adapter(KEYS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights.bin").write_bytes(b"of another model")
    attach(update, open_base(base), tmp_path / "b" / "out.onnx")
    check(base, tmp_path / "b" / "out.onnx", update)
    (location,) = set(locations(tmp_path / "b" / "out.onnx").values())
    assert digest(tmp_path / "b" / location) == digest(tmp_path / "a" / "weights.bin")
    assert (tmp_path / "b" / "weights.bin").read_bytes() == b"of another model"
    assert names_in(tmp_path / "a") == ["base.onnx", "weights.bin"]


def test_merge_writes_a_new_data_file_in_which_only_the_targets_differ(tmp_path):
    base, update = external(tmp_path / "base.onnx"), adapter({"m.k.weight": (32, 64)})
    before = (tmp_path / "weights.bin").read_bytes()
    merge(update, open_base(base), tmp_path / "out.onnx")
    assert (tmp_path / "weights.bin").read_bytes() == before
    (location,) = set(locations(tmp_path / "out.onnx").values())
    after = (tmp_path / location).read_bytes()
    place = next(t for t in onnx.load(base, load_external_data=False).graph.initializer if t.name == "wk")
    start = int(next(e.value for e in place.external_data if e.key == "offset"))
    stop = start + 64 * 32 * 4
    assert (after[:start], after[stop:], len(after)) == (before[:start], before[stop:], len(before))
    assert after[start:stop] != before[start:stop]
    check(base, tmp_path / "out.onnx", update)


@both_verbs
def test_two_data_files_are_taken_as_they_are_needed(verb, tmp_path):
    made = model(TEXT)
    external_data_helper.convert_model_to_external_data(made, all_tensors_to_one_file=False, size_threshold=0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    onnx.save_model(made, tmp_path / "a" / "base.onnx")
    update = adapter(KEYS)
    base = open_base(tmp_path / "a" / "base.onnx")
    VERBS[verb](update, base, tmp_path / "a" / "out.onnx")
    written = {name for name in names_in(tmp_path / "a") if name.startswith("out")}
    assert len(written) == (3 if verb == "merge" else 1)  # the model, and a file each for wq and wk
    VERBS[verb](update, base, tmp_path / "b" / "out.onnx")
    assert len(names_in(tmp_path / "b")) == 5
    for folder in ("a", "b"):
        check(tmp_path / "a" / "base.onnx", tmp_path / folder / "out.onnx", update)


def test_an_external_tied_weight_is_copied_into_a_data_file(tmp_path):
    made = model("""g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
      { t = Transpose(w)  ["/m/q/MatMul"] h = MatMul(x, t)  ["/m/k/MatMul"] y = MatMul(h, w) }""")
    base = external(tmp_path / "base.onnx", made)
    before, update = digest(tmp_path / "weights.bin"), adapter({"m.q.weight": (6, 6), "m.k.weight": (6, 6)})
    merge(update, open_base(base), tmp_path / "out.onnx")
    kept, x = stored(base)["w"], np.random.default_rng(4).standard_normal((3, 6)).astype(np.float32)
    wanted = x @ (kept.T + update["m.q.weight"].matrix().T) @ (kept + update["m.k.weight"].matrix().T)
    assert relative_error(session(tmp_path / "out.onnx").run(["y"], {"x": x})[0], wanted) <= 2e-6
    assert digest(tmp_path / "weights.bin") == before
    assert len(locations(tmp_path / "out.onnx")) == 3
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_tensors_that_share_their_bytes_are_changed_one_by_one(tmp_path):
    made = model("""g (float[N,6] x) => (float[N,6] y) <float[6,6] wq, float[6,6] wk, float[6,6] wo>
      { ["/m/q/MatMul"] h = MatMul(x, wq)  ["/m/k/MatMul"] t = MatMul(h, wk)  ["/m/o/MatMul"] y = MatMul(t, wo) }""")
    base = external(tmp_path / "base.onnx", made)
    graph = onnx.load(base, load_external_data=False)
    same = [t for t in graph.graph.initializer if t.name in ("wq", "wk")]
    del same[1].external_data[:]
    same[1].external_data.extend(same[0].external_data)
    save(graph, base)
    kept, update = stored(base), adapter({"m.q.weight": (6, 6), "m.k.weight": (6, 6)})
    for name, targets in (("one", ["m.q.weight"]), ("two", list(update))):
        out = tmp_path / f"{name}.onnx"
        merge(Adapter({key: update[key] for key in targets}), open_base(base), out)
        x = np.random.default_rng(4).standard_normal((3, 6)).astype(np.float32)
        weights = [
            kept[f"w{n}"] + (update[k].matrix().T if k in targets else 0) for n, k in zip("qk", update, strict=True)
        ]
        wanted = x @ weights[0] @ weights[1] @ kept["wo"]
        assert relative_error(session(out).run(["y"], {"x": x})[0], wanted) <= 2e-6
        assert (tmp_path / "weights.bin").stat().st_size


def test_a_merged_model_with_external_data_is_verified(tmp_path):
    base, update = external(tmp_path / "base.onnx"), adapter(KEYS)
    merge(update, open_base(base), tmp_path / "out.onnx")
    verdict = verify(open_base(base), update, open_base(tmp_path / "out.onnx"))
    assert (verdict.problems, sorted(verdict.touched)) == ([], sorted(KEYS))


def test_packed_and_empty_external_tensors_do_not_disturb(tmp_path):
    made = model(TEXT)
    made.graph.initializer.append(helper.make_tensor("q4", onnx.TensorProto.INT4, [3, 5], range(-7, 8)))
    made.graph.initializer.append(helper.make_tensor("none", onnx.TensorProto.FLOAT, [0, 5], []))
    base, update = external(tmp_path / "base.onnx", made), adapter(KEYS)
    merge(update, open_base(base), tmp_path / "out.onnx")
    assert verify(open_base(base), update, open_base(tmp_path / "out.onnx")).problems == []
    check(base, tmp_path / "out.onnx", update)


def test_the_plan_tells_what_will_be_written(tmp_path):
    base, update = external(tmp_path / "a" / "base.onnx"), adapter(KEYS)
    (tmp_path / "b").mkdir()
    for verb, place in (("attach", "a"), ("attach", "b"), ("merge", "a"), ("merge", "b")):
        out = tmp_path / place / f"{verb}.onnx"
        opened = open_base(base)
        plan = prepare(verb, [("default", update)], opened, Options(out))
        written = opened.apply(plan).written
        assert abs(plan.writes - written) < 6000, (verb, place)
        assert any("copies weights.bin" in note for note in plan.notes) == ((verb, place) == ("attach", "b"))


def test_another_output_of_the_same_name_leaves_no_old_data_behind(tmp_path):
    base = external(tmp_path / "a" / "base.onnx")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "out.onnx.mine.data").write_bytes(b"of somebody else")
    first, second = adapter(KEYS), adapter({"m.q.weight": lora(64, 48, seed=9)})
    kept = ["out.onnx", "out.onnx.mine.data"]
    for verb, update in (("merge", first), ("merge", second), ("attach", second), ("merge", first)):
        VERBS[verb](update, open_base(base), tmp_path / "b" / "out.onnx", force=True)
        (location,) = set(locations(tmp_path / "b" / "out.onnx").values())
        assert names_in(tmp_path / "b") == sorted([*kept, location])
    check(base, tmp_path / "b" / "out.onnx", first)


@pytest.mark.parametrize("stopped", [OSError(5, "of the disk"), KeyboardInterrupt()])
def test_a_run_that_ends_just_after_the_model_is_in_place_keeps_its_data(stopped, tmp_path, monkeypatch):
    base, out = external(tmp_path / "a" / "base.onnx"), tmp_path / "out.onnx"
    merge(adapter({"m.q.weight": lora(64, 48, seed=9)}), open_base(base), out)
    sync = atomic._sync

    def stop(folder):
        sync(folder)
        if set(locations(out).values()) - before:
            raise stopped

    before, update = set(locations(out).values()), adapter(KEYS)
    monkeypatch.setattr(atomic, "_sync", stop)
    with pytest.raises((LoraFormatError, KeyboardInterrupt)):
        merge(update, open_base(base), out, force=True)
    check(base, out, update)


def test_a_run_leaves_the_data_of_another_one_to_the_same_output_alone(tmp_path, monkeypatch):
    """The second begins and ends when the first has its data in its place, and not yet the model."""
    base, out = external(tmp_path / "a" / "base.onnx"), tmp_path / "out.onnx"
    first, others = adapter(KEYS), [adapter({"m.q.weight": lora(64, 48, seed=9)})]
    replace = os.replace

    def between(temporary, path):
        if path == out and others:
            merge(others.pop(), open_base(base), out, force=True)
        replace(temporary, path)

    monkeypatch.setattr("loraformat.atomic.os.replace", between)
    merge(first, open_base(base), out, force=True)
    assert not others
    check(base, out, first)


@pytest.mark.parametrize("stopped", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_swap_that_is_not_finished_leaves_its_older_adapters_too(stopped, tmp_path, monkeypatch):
    base, out = external(tmp_path / "a" / "base.onnx"), tmp_path / "out.onnx"
    attach({"one": adapter(KEYS)}, open_base(base), out, mode="swap")
    before = {path: digest(path) for path in tmp_path.iterdir() if path.is_file()}

    def stop(file, data):
        raise stopped

    monkeypatch.setattr(store, "_write_all", stop)
    with pytest.raises((LoraFormatError, KeyboardInterrupt)):
        attach({"one": adapter({"m.q.weight": lora(64, 48, seed=9)})}, open_base(base), out, mode="swap", force=True)
    assert {path: digest(path) for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_data_of_an_older_output_stays_while_a_model_beside_it_needs_it(tmp_path):
    base, first, second = (
        external(tmp_path / "a" / "base.onnx"),
        adapter(KEYS),
        adapter({"m.q.weight": lora(64, 48, seed=9)}),
    )
    merge(first, open_base(base), tmp_path / "out.onnx")
    shutil.copy(tmp_path / "out.onnx", tmp_path / "copy.onnx")
    merge(second, open_base(base), tmp_path / "out.onnx", force=True)
    check(base, tmp_path / "copy.onnx", first)
    check(base, tmp_path / "out.onnx", second)
    (tmp_path / "copy.onnx").unlink()
    merge(first, open_base(base), tmp_path / "out.onnx", force=True)
    assert names_in(tmp_path) == sorted(
        ["a", "a/base.onnx", "a/weights.bin", "out.onnx", *set(locations(tmp_path / "out.onnx").values())]
    )


def test_the_same_adapter_in_another_base_leaves_the_data_of_the_first_alone(tmp_path):
    one, two = external(tmp_path / "a" / "base.onnx"), external(tmp_path / "b" / "base.onnx", model(TEXT, seed=5))
    merge(adapter(KEYS), open_base(one), tmp_path / "out.onnx")
    shutil.copy(tmp_path / "out.onnx", tmp_path / "copy.onnx")
    merge(adapter(KEYS), open_base(two), tmp_path / "out.onnx", force=True)
    check(one, tmp_path / "copy.onnx", adapter(KEYS))
    check(two, tmp_path / "out.onnx", adapter(KEYS))


def test_the_data_of_an_attached_model_that_was_taken_elsewhere_is_its_own_again(tmp_path):
    base, update = external(tmp_path / "a" / "base.onnx"), adapter(KEYS)
    (tmp_path / "b").mkdir()
    attach(update, open_base(base), tmp_path / "b" / "out.onnx")
    detach(open_base(tmp_path / "b" / "out.onnx"), tmp_path / "b" / "again.onnx")
    assert open_base(tmp_path / "b" / "again.onnx").identity == open_base(base).identity
    attach(update, open_base(base), tmp_path / "a" / "out.onnx")
    detach(open_base(tmp_path / "a" / "out.onnx"), tmp_path / "a" / "again.onnx")
    assert (tmp_path / "a" / "again.onnx").read_bytes() == base.read_bytes()


HOSTILE = {
    "a file of two names": {"location": "hard.bin"},
    "a path upwards": {"location": "../secret.bin"},
    "a path upwards in the middle": {"location": "sub/../../secret.bin"},
    "an absolute path": {"location": "FOLDER/secret.bin"},
    "a path of another system": {"location": "..\\secret.bin"},
    "no path": {"location": ""},
    "a folder": {"location": "sub"},
    "a missing file": {"location": "missing.bin"},
    "a link": {"location": "link.bin"},
    "a file behind a linked folder": {"location": "linked/secret.bin"},
    "an offset beyond the end": {"offset": "999999999"},
    "a negative offset": {"offset": "-4"},
    "an offset that is no number": {"offset": "0x10"},
    "a length that is not the tensor's": {"length": "4"},
    "a negative length": {"length": "-12288"},
    "an unknown key": {"__class__": "x"},
}


@both_verbs
@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_external_data_is_refused_and_nothing_is_written(verb, entries, tmp_path):
    base = external(tmp_path / "in" / "base.onnx")
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "link.bin").symlink_to(tmp_path / "in" / "weights.bin")
    (tmp_path / "in" / "hard.bin").write_bytes(bytes(1 << 20))
    (tmp_path / "in" / "hard2.bin").hardlink_to(tmp_path / "in" / "hard.bin")
    (tmp_path / "in" / "linked").symlink_to(tmp_path)
    made = onnx.load(base, load_external_data=False)
    tensor = next(t for t in made.graph.initializer if t.name == "wo")  # not a target: it is checked all the same
    had = {e.key: e.value for e in tensor.external_data}
    del tensor.external_data[:]
    for key, value in {**had, **entries}.items():
        tensor.external_data.add(key=key, value=value.replace("FOLDER", str(tmp_path)))
    save(made, base)
    before = names_in(tmp_path)
    with pytest.raises(LoraFormatError, match="LF-610"):
        VERBS[verb](adapter(KEYS), open_base(base), tmp_path / "in" / "out.onnx")
    assert names_in(tmp_path) == before


def in_a_constant(made, tensor):
    made.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=tensor))


def in_a_function(made, tensor):
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    made.functions.append(helper.make_function("own", "F", [], ["y"], [node], [helper.make_opsetid("", 18)]))


def in_a_sparse_tensor(made, tensor):
    indices = helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [9]))


@pytest.mark.parametrize("put", [in_a_constant, in_a_function, in_a_sparse_tensor])
def test_external_data_is_checked_and_taken_along_wherever_it_is_used(put, tmp_path):
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "in" / "more.bin").write_bytes(bytes(range(4)))
    made = model(TEXT)
    tensor = onnx.TensorProto(name="more", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="more.bin")
    put(made, tensor)
    attach(adapter(KEYS), open_base(save(made, tmp_path / "in" / "base.onnx")), tmp_path / "out" / "out.onnx")
    (data,) = [name for name in names_in(tmp_path / "out") if name != "out.onnx"]
    assert (tmp_path / "out" / data).read_bytes() == bytes(range(4))
    assert data.encode() in (tmp_path / "out" / "out.onnx").read_bytes()
    (tmp_path / "in" / "more.bin").write_bytes(b"")
    with pytest.raises(LoraFormatError, match="LF-610"):
        attach(adapter(KEYS), open_base(tmp_path / "in" / "base.onnx"), tmp_path / "out" / "other.onnx")


def test_an_external_tensor_without_values_may_lie_in_an_empty_file(tmp_path):
    made = model(TEXT)
    tensor = made.graph.initializer.add(name="none", dims=[0, 5], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value="empty.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    assert open_base(save(made, tmp_path / "base.onnx")).read("none").shape == (0, 5)


@pytest.mark.parametrize("dims", [[1 << 40, 1 << 40], [-8, -1536], [-1]])
def test_a_hostile_shape_of_external_data_is_refused(dims, tmp_path):
    base = external(tmp_path / "base.onnx")
    made = onnx.load(base, load_external_data=False)
    tensor = next(t for t in made.graph.initializer if t.name == "wo")
    tensor.dims[:] = dims
    kept = [e for e in tensor.external_data if e.key != "length"]
    del tensor.external_data[:]
    tensor.external_data.extend(kept)
    with pytest.raises(LoraFormatError, match="LF-610"):
        merge(adapter(KEYS), open_base(save(made, base)), tmp_path / "out.onnx")


@both_verbs
def test_an_existing_output_is_kept_without_force(verb, tmp_path):
    base, out = external(tmp_path / "base.onnx"), tmp_path / "out.onnx"
    out.write_bytes(b"precious")
    with pytest.raises(LoraFormatError, match="LF-702"):
        VERBS[verb](adapter(KEYS), open_base(base), out)
    assert (out.read_bytes(), names_in(tmp_path)) == (b"precious", ["base.onnx", "out.onnx", "weights.bin"])
    VERBS[verb](adapter(KEYS), open_base(base), out, force=True)
    check(base, out, adapter(KEYS))


@both_verbs
@pytest.mark.parametrize("name", ["base.onnx", "./base.onnx", "link.onnx"])
def test_the_base_itself_is_no_output(verb, name, tmp_path):
    base = external(tmp_path / "base.onnx")
    (tmp_path / "link.onnx").symlink_to(base)
    before = digest(base)
    with pytest.raises(LoraFormatError, match="LF-703"):
        VERBS[verb](adapter(KEYS), open_base(base), os.path.join(tmp_path, name), force=True)
    assert digest(base) == before


@both_verbs
def test_an_output_in_no_folder_is_refused(verb, tmp_path):
    base = external(tmp_path / "base.onnx")
    with pytest.raises(LoraFormatError, match="LF-703"):
        VERBS[verb](adapter(KEYS), open_base(base), tmp_path / "missing" / "out.onnx")


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    base = external(tmp_path / "a" / "base.onnx")
    (tmp_path / "b").mkdir()
    replace, calls = os.replace, []

    def fail_at_the_last(source, target):
        calls.append(target)
        if os.fspath(target).endswith("out.onnx"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_last)
    with pytest.raises(LoraFormatError, match="LF-703"):
        merge(adapter(KEYS), open_base(base), tmp_path / "b" / "out.onnx")
    assert len(calls) == 2
    assert names_in(tmp_path / "b") == []


def room(monkeypatch, count):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - count, count))


@pytest.mark.parametrize("verb", [*VERBS, "detach"])
@pytest.mark.parametrize("shape", ["inside", "outside", "folder"])
def test_a_disk_without_room_is_told_before_the_first_byte(verb, shape, tmp_path, monkeypatch):
    """Of 21 kB each time; room that is just enough is enough."""
    base = tmp_path / "base" / "base.onnx"
    base.parent.mkdir()
    save(model(TEXT), base) if shape == "inside" else external(base)
    attach(adapter(KEYS), open_base(base), base.with_name("attached.onnx"))
    given = base.with_name("attached.onnx") if verb == "detach" else base
    if shape == "folder":
        (base if verb == "detach" else base.with_name("attached.onnx")).unlink()
        given = base.parent
    (tmp_path / "out").mkdir()
    run = {"detach": detach} | {v: partial(f, adapter(KEYS)) for v, f in VERBS.items()}
    room(monkeypatch, 20_000)
    with pytest.raises(LoraFormatError, match=r"LF-703 .* takes [\d,]+ bytes, and the disk has 20,000 left"):
        run[verb](open_base(given), tmp_path / "out" / "new.onnx")
    assert names_in(tmp_path / "out") == []
    room(monkeypatch, 50_000)
    run[verb](open_base(given), tmp_path / "out" / "new.onnx")


@pytest.mark.parametrize("mode", ["branch", "swap"])
def test_a_model_that_no_file_could_hold_is_refused_when_it_is_planned(mode, tmp_path, monkeypatch):
    base = save(model(TEXT), tmp_path / "base.onnx")
    monkeypatch.setattr(store, "_MESSAGE", base.stat().st_size + 1000)
    options = Options(tmp_path / "out.onnx", mode)
    if mode == "swap":  # whose adapters lie beside the model
        assert prepare("attach", [("a", adapter(KEYS))], open_base(base), options).writes
        return
    with pytest.raises(LoraFormatError, match=r"LF-703 .*less than 2 GiB, and would have [\d,]+ bytes"):
        prepare("attach", [("a", adapter(KEYS))], open_base(base), options)


def test_data_that_shrinks_while_it_is_read_is_a_failure(tmp_path):
    base = external(tmp_path / "a" / "base.onnx")
    (tmp_path / "b").mkdir()
    opened = open_base(base)
    plan = prepare("attach", [("default", adapter(KEYS))], opened, Options(tmp_path / "b" / "out.onnx"))
    with open(tmp_path / "a" / "weights.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(LoraFormatError):
        opened.apply(plan)
    assert names_in(tmp_path / "b") == []


FOLDED = [
    ("float", np.float32),
    ("float", np.float16),
    ("float", ml_dtypes.bfloat16),
    ("float16", np.float32),
    ("float16", np.float16),
    ("float16", ml_dtypes.bfloat16),
    ("double", np.float32),
]


@pytest.mark.parametrize(("kind", "dtype"), FOLDED)
@pytest.mark.parametrize("text", [TEXT, TEXT.replace("T,N", "N")], ids=["3 axes", "2 axes"])
def test_nothing_constant_is_left_in_the_graph_that_runs(kind, dtype, text, tmp_path):
    base = save(model(text.replace("float", kind)), tmp_path / "base.onnx")
    update = adapter({key: lora(*shape, dtype=dtype) for key, shape in KEYS.items()})
    attach(update, open_base(base), tmp_path / "out.onnx")
    ran = {}
    for name in ("base", "out"):
        session(tmp_path / f"{name}.onnx", optimised=tmp_path / f"{name}.optimised.onnx")
        graph = onnx.load(tmp_path / f"{name}.optimised.onnx").graph
        constant = {t.name for t in graph.initializer}
        # ONNX Runtime 1.32 computes float16 in float32 on the CPU, between casts of its own, W's too.
        own = "InsertedPrecisionFreeCast_"
        left = [n.op_type for n in graph.node if all(i in constant for i in n.input) and not n.name.startswith(own)]
        assert left == []
        ran[name] = Counter(node.op_type for node in graph.node)
    added = ran["out"] - ran["base"]
    if kind != "float16":
        assert added.keys() <= {"MatMul", "Gemm", "Add", "FusedMatMul"}
        assert added.total() - (ran["base"] - ran["out"]).total() <= 3 * len(KEYS)


def test_a_fresh_adapter_changes_no_bit(tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    attach(init(base, ["q", "k", "o"], rank=3, alpha=6), base, tmp_path / "out.onnx")
    plain = [run(tmp_path / f"{name}.onnx", optimise=False)["y"] for name in ("base", "out")]
    assert plain[0].tobytes() == plain[1].tobytes()
    fused = [run(tmp_path / f"{name}.onnx")["y"] for name in ("base", "out")]
    assert relative_error(*fused) <= 1e-6


def test_runs_of_rows_of_external_data_are_read_and_not_mapped(tmp_path):
    """The pages of a mapped file stay in the resident set."""
    base = open_base(external(tmp_path / "base.onnx"))
    run = base.read("wk", (3, 9))
    np.testing.assert_array_equal(run, stored(tmp_path / "base.onnx")["wk"][3:9])
    assert run.base is None or not isinstance(run.base, np.memmap)
