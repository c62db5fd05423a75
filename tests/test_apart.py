"""What a command reads is never what it writes over, with --force either."""

import hashlib

import numpy as np
import onnx
import pytest
from onnx import helper
from safetensors.numpy import save_file

import loraformat as lf

KEY = "m.q.weight"


def made(home):
    """An adapter in two files, a checkpoint in shards and in one file, and a model with data beside it."""
    draw = np.random.default_rng(0)
    w = draw.standard_normal((8, 6)).astype(np.float32)
    pair = lf.Lora(draw.standard_normal((2, 6), np.float32), draw.standard_normal((8, 2), np.float32), 4.0, "factor")
    for name in ("a", "b"):
        lf.save(lf.Adapter({KEY: lf.Update((pair,))}), home / f"{name}.safetensors")
    (home / "base").mkdir()
    save_file({KEY: w}, home / "base" / "model.safetensors")
    save_file({KEY: w}, home / "one.safetensors")
    save_file({KEY: w + 2 * (pair.lora_B @ pair.lora_A)}, home / "tuned.safetensors")
    floats = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 6), ("y", 8))]
    node = helper.make_node("MatMul", ["x", KEY], ["y"])
    weight = onnx.numpy_helper.from_array(w.T.copy(), KEY)
    model = helper.make_model(helper.make_graph([node], "g", floats[:1], floats[1:], [weight]), ir_version=9)
    onnx.save(model, home / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (home / "map.json").write_text("{}")


def contents(home):
    return {p.relative_to(home): hashlib.sha256(p.read_bytes()).hexdigest() for p in home.rglob("*") if p.is_file()}


OVER = {
    "bind, its base": "bind a.safetensors --base one.safetensors -o one.safetensors",
    "bind, a shard": "bind a.safetensors --base base -o base/model.safetensors",
    "convert, its base": "convert a.safetensors one.safetensors --base one.safetensors",
    "retarget, its base": "retarget a.safetensors --base one.safetensors -o one.safetensors",
    "retarget, its origin": "retarget a.safetensors --base one.safetensors --origin tuned.safetensors -o tuned.safetensors",
    "init, a shard": "init base -t q -r 2 -a 2 --axes *=out,in -o base/model.safetensors",
    "extract, the tuned model": "extract one.safetensors tuned.safetensors --rank 2 --axes *=out,in -o tuned.safetensors",
    "extract, the model": "extract att.onnx --to native -o att.onnx",
    "detach, the model's data": "detach att.onnx -o m.data",
    "report, the adapter": "report a.safetensors -o a.safetensors",
    "report, its base": "report a.safetensors --base one.safetensors --axes *=out,in -o one.safetensors",
    "merge, the model's data": "merge a.safetensors --into m.onnx -o m.data",
    "merge, the adapter": "merge a.safetensors:0.5 --into one.safetensors --axes *=out,in -o a.safetensors",
    "attach, the model's data": "attach a.safetensors --to m.onnx -o m.data",
    "attach, the adapter": "attach mine=a.safetensors --to m.onnx -o a.safetensors",
    "attach, the names": "attach a.safetensors --to m.onnx --names map.json -o map.json",
    "combine, the recipe for an adapter": "combine a.safetensors b.safetensors -o c.safetensors --save-recipe b.safetensors",
    "combine, the recipe for the result": "combine a.safetensors b.safetensors -o c.safetensors --save-recipe c.safetensors",
}


@pytest.mark.parametrize("case", OVER)
def test_force_replaces_no_input(run, case, tmp_path):
    made(tmp_path)
    assert run("attach", "a.safetensors", "--to", "m.onnx", "-o", "att.onnx").code == 0
    before = contents(tmp_path)
    told = run(*OVER[case].split(), "--force")
    assert told.code == 1
    assert "LF-703" in told.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "verb", ["convert a.safetensors a.safetensors", "bind a.safetensors --base one.safetensors --axes *=out,in"]
)
def test_an_adapter_is_written_anew_in_its_own_place(run, verb, tmp_path):
    made(tmp_path)
    assert run(*verb.split(), "--force").code == 0
    assert lf.digest(lf.load(tmp_path / "a.safetensors")) == lf.digest(lf.load(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("link", ["hard", "soft", "through a folder"])
def test_a_base_by_another_name_is_the_base(run, link, tmp_path):
    made(tmp_path)
    out = tmp_path / "other.safetensors"
    if link == "hard":
        out.hardlink_to(tmp_path / "one.safetensors")
    elif link == "soft":
        out.symlink_to("one.safetensors")
    else:
        (tmp_path / "same").symlink_to(".")
        out = tmp_path / "same" / "one.safetensors"
    told = run("merge", "a.safetensors", "--into", "one.safetensors", "-o", out, "--axes", "*=out,in", "--force")
    assert (told.code, "LF-703" in told.err) == (1, True)


@pytest.mark.parametrize(("base", "out"), [("one.safetensors", "o.onnx"), ("m.onnx", "o.safetensors")])
def test_a_name_that_promises_another_kind_of_model_is_refused(run, base, out, tmp_path):
    made(tmp_path)
    told = run("merge", "a.safetensors", "--into", base, "--axes", "*=out,in", "-o", out)
    assert (told.code, "made by its own exporter" in told.err) == (1, True)
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("out", [".", "..", "-", ""])
@pytest.mark.parametrize("words", ["merge a.safetensors --into base -o", "convert a.safetensors"])
def test_a_name_that_is_none_is_refused_in_words(run, words, out, tmp_path):
    made(tmp_path)
    before = contents(tmp_path)
    told = run(*words.split(), out, "--force")
    assert (told.code, "is no name for an output" in told.err) == (1, True)
    assert contents(tmp_path) == before
