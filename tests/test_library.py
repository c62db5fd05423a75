"""The library's verbs write what the command line's write, byte for byte."""

import pytest
from graphs import adapter, lora, model, save

import loraformat as lf


@pytest.fixture
def files(tmp_path):
    """A model and two adapters."""
    made = model("g (float[N, 7] x) => (float[N, 5] y) <float[7, 5] w> { y = MatMul (x, w) }")
    made.graph.node[0].input[1] = made.graph.initializer[0].name = "m.proj.weight"
    save(made, tmp_path / "m.onnx")
    for seed in (1, 2):
        lf.save(adapter({"m.proj.weight": lora(5, 7, seed=seed)}), tmp_path / f"{seed}.safetensors")
    return tmp_path


@pytest.mark.parametrize("verb", ["merge", "attach"])
def test_several_adapters_with_weights(verb, run, files):
    words = ["1.safetensors:0.5", "2.safetensors"]
    assert run(verb, *words, "--into" if verb == "merge" else "--to", "m.onnx", "-o", "said.onnx").code == 0
    given = [(lf.load(files / "1.safetensors"), 0.5), (lf.load(files / "2.safetensors"), 1.0)]
    done = getattr(lf, verb)(given, lf.open_base(files / "m.onnx"), files / "done.onnx")
    assert (files / "done.onnx").read_bytes() == (files / "said.onnx").read_bytes()
    assert done.norms.keys() == {"m.proj.weight"}


def test_one_adapter_folded(run, files):
    assert run("attach", "1.safetensors", "--to", "m.onnx", "-o", "said.onnx", "--prefold").code == 0
    lf.attach(lf.load(files / "1.safetensors"), lf.open_base(files / "m.onnx"), files / "done.onnx", prefold=True)
    assert (files / "done.onnx").read_bytes() == (files / "said.onnx").read_bytes()


def test_every_mode_takes_its_keywords_and_adapters_their_names(run, files):
    words = ("--mode", "swap", "--pad-rank", "7", "--targets", "*.proj", "--slots", "required")
    assert (
        run("attach", "one=1.safetensors", "two=2.safetensors", "--to", "m.onnx", "-o", "said.onnx", *words).code == 0
    )
    given = {name: lf.load(files / f"{n}.safetensors") for n, name in enumerate(("one", "two"), 1)}
    how = {"mode": "swap", "pad_rank": 7, "targets": ["*.proj"], "slots": "required"}
    lf.attach(given, lf.open_base(files / "m.onnx"), files / "done.onnx", **how)
    for end in ("onnx", "one.onnx_adapter", "two.onnx_adapter"):
        assert (files / f"done.{end}").read_bytes() == (files / f"said.{end}").read_bytes()
    with pytest.raises(TypeError, match="topologie"):
        lf.attach(given["one"], lf.open_base(files / "m.onnx"), files / "none.onnx", topologie="concat")


def test_what_was_attached_comes_out_by_its_name(files):
    one = lf.load(files / "1.safetensors")
    lf.attach([(one, 1.0), (lf.load(files / "2.safetensors"), 1.0)], lf.open_base(files / "m.onnx"), files / "o.onnx")
    opened = lf.open_base(files / "o.onnx")
    assert lf.digest(lf.extract(opened, name="default1")) == lf.digest(one)
    with pytest.raises(lf.LoraFormatError, match="2 adapters attached"):
        lf.extract(opened)
    lf.detach(opened, files / "again.onnx")
    assert (files / "again.onnx").read_bytes() == (files / "m.onnx").read_bytes()


def test_a_conversion_tells_what_it_read_and_wrote(files):
    done = lf.convert(files / "1.safetensors", files / "peft")
    assert (done.source.name, done.destination.name, done.warnings) == ("native", "peft", [])
    assert lf.digest(lf.load(files / "peft")) == lf.digest(done.adapter)


@pytest.mark.parametrize("verb", ["merge", "attach"])
def test_an_adapter_of_other_weights_is_taken_only_where_that_is_asked(verb, files):
    made = model("g (float[N, 7] x) => (float[N, 5] y) <float[7, 5] w> { y = MatMul (x, w) }", seed=9)
    made.graph.node[0].input[1] = made.graph.initializer[0].name = "m.proj.weight"
    save(made, files / "other.onnx")
    own = lf.load(files / "1.safetensors")
    weight = lf.open_base(files / "m.onnx").read("m.proj.weight")
    update = own["m.proj.weight"].placed(lf.Placement(weight.shape, (1,), (0,)))
    bound = lf.Adapter({"m.proj.weight": lf.Update(update.parts, update.placement, base_sha256="0" * 64)})
    with pytest.raises(lf.LoraFormatError, match="LF-607"):
        getattr(lf, verb)(bound, lf.open_base(files / "other.onnx"), files / "out.onnx")
    getattr(lf, verb)(bound, lf.open_base(files / "other.onnx"), files / "out.onnx", any_base=True)
