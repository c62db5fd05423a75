"""Folders of several models: every target in every file that has its module, the numbers PEFT's own, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import adapter, model, save, session
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import extract
from loraformat.verbs.merge import attach, merge, prepare
from loraformat.verbs.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "onnx"
T5 = GOLDEN / "t5" / "model"
PIPELINE = GOLDEN / "pipeline" / "model"
VERBS = {"merge": merge, "attach": attach}
COMPONENTS = ("text_encoder", "unet")


def whole(case, *components):
    """The adapters of a pipeline's components, as one."""
    parts = {c: lf.load(GOLDEN / case / "adapter" / c) for c in components}
    return lf.Adapter({f"{c}:{k}": u for c, part in parts.items() for k, u in part.items()}, components=components)


@pytest.fixture
def t5(tmp_path):
    """The exported folder with the two decoders that are files of their own."""
    shutil.copytree(T5, tmp_path / "t5", ignore=shutil.ignore_patterns("*_merged.onnx"))
    return tmp_path / "t5"


def ran(path, feeds):
    """Output → values; of the feeds, what the model takes."""
    running = session(path)
    taken = {i.name for i in running.get_inputs()}
    names = [o.name for o in running.get_outputs()]
    return dict(zip(names, running.run(names, {k: v for k, v in feeds.items() if k in taken}), strict=True))


def generated(folder, truth):
    """(the encoder's states, the logits of all tokens at once, those of the last one after the others as its past)."""
    feeds = {"input_ids": truth["input_ids"], "attention_mask": truth["attention_mask"]}
    hidden = ran(folder / "encoder_model.onnx", feeds)["last_hidden_state"]
    common = {"encoder_hidden_states": hidden, "encoder_attention_mask": truth["attention_mask"]}
    tokens = truth["decoder_input_ids"]
    at_once = ran(folder / "decoder_model.onnx", {**common, "input_ids": tokens})["logits"]
    first = ran(folder / "decoder_model.onnx", {**common, "input_ids": tokens[:, :-1]})
    past = {k.replace("present", "past_key_values"): v for k, v in first.items() if k.startswith("present")}
    step = ran(folder / "decoder_with_past_model.onnx", {**common, **past, "input_ids": tokens[:, -1:]})["logits"]
    return hidden, at_once, step


@pytest.mark.parametrize("verb", VERBS)
def test_an_encoder_and_its_decoders_compute_what_peft_computes(verb, t5, tmp_path):
    truth = load_file(GOLDEN / "t5" / "truth.safetensors")
    VERBS[verb](lf.load(GOLDEN / "t5" / "adapter"), open_base(t5), tmp_path / "out")
    hidden, at_once, step = generated(tmp_path / "out", truth)
    valid = truth["attention_mask"].astype(bool)
    assert relative_error(hidden[valid], truth["adapted.hidden"][valid]) <= 1e-5
    assert relative_error(at_once, truth["adapted.logits"]) <= 1e-5
    assert relative_error(step, truth["adapted.logits"][:, -1:]) <= 1e-5
    _, before, _ = generated(t5, truth)
    assert relative_error(before, truth["base.logits"]) <= 1e-5
    assert relative_error(before, truth["adapted.logits"]) > 1e-2


@pytest.mark.parametrize("verb", VERBS)
def test_the_decoder_of_two_branches_computes_what_peft_computes(verb, tmp_path):
    truth = load_file(GOLDEN / "t5" / "truth.safetensors")
    VERBS[verb](lf.load(GOLDEN / "t5" / "adapter"), open_base(T5), tmp_path / "out")
    hidden, _, _ = generated(tmp_path / "out", truth)
    merged, tokens = tmp_path / "out" / "decoder_model_merged.onnx", truth["decoder_input_ids"]
    common = {"encoder_hidden_states": hidden, "encoder_attention_mask": truth["attention_mask"]}
    nothing = {
        i.name: np.zeros([2, 3, 1, 6], np.float32) for i in session(merged).get_inputs() if i.name.startswith("past")
    }
    first = ran(merged, {**common, **nothing, "input_ids": tokens[:, :-1], "use_cache_branch": np.array([False])})
    past = {k.replace("present", "past_key_values"): v for k, v in first.items() if k.startswith("present")}
    step = ran(merged, {**common, **past, "input_ids": tokens[:, -1:], "use_cache_branch": np.array([True])})["logits"]
    assert relative_error(first["logits"], truth["adapted.logits"][:, :-1]) <= 1e-5
    assert relative_error(step, truth["adapted.logits"][:, -1:]) <= 1e-5


@pytest.mark.parametrize("verb", VERBS)
def test_the_components_of_a_pipeline_compute_what_peft_computes(verb, tmp_path):
    truth = load_file(GOLDEN / "pipeline" / "truth.safetensors")
    feeds = truth | {"timestep": truth["timestep"].astype(np.float32)}
    VERBS[verb](whole("pipeline", "unet", "text_encoder"), open_base(PIPELINE), tmp_path / "out")
    for folder, wanted in ((tmp_path / "out", "adapted"), (PIPELINE, "base")):
        noise = ran(folder / "unet" / "model.onnx", feeds)["out_sample"]
        ids = {"input_ids": truth["input_ids"]}
        hidden = ran(folder / "text_encoder" / "model.onnx", ids)["last_hidden_state"]
        assert relative_error(noise, truth[f"{wanted}.noise"]) <= 1e-5
        assert relative_error(hidden, truth[f"{wanted}.hidden"]) <= 1e-5
    assert relative_error(truth["base.noise"], truth["adapted.noise"]) > 1e-2


@pytest.mark.parametrize("case", ["t5", "pipeline"])
def test_what_is_attached_to_a_folder_comes_out_again(case, run, tmp_path):
    base = T5 if case == "t5" else PIPELINE
    given = lf.load(GOLDEN / "t5" / "adapter") if case == "t5" else whole("pipeline", "unet", "text_encoder")
    lf.save(given, tmp_path / "a.safetensors")
    told = run("attach", "mine=a.safetensors", "--to", base, "-o", "attached", "--verify")
    assert told.code == 0, told.err
    opened = open_base(tmp_path / "attached")
    assert opened.attached == ["mine"]
    assert lf.digest(extract(opened)) == lf.digest(given)
    assert run("verify", "--base", base, "--adapter", "a.safetensors", "--merged", "attached").code == 0
    assert run("extract", "attached", "-o", "again.safetensors").code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert run("detach", "attached", "-o", "detached").code == 0
    files = {p.relative_to(base): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    assert {
        p.relative_to(tmp_path / "detached"): p.read_bytes() for p in (tmp_path / "detached").rglob("*") if p.is_file()
    } == files
    with pytest.raises(lf.LoraFormatError, match="LF-613"):
        extract(open_base(base))


def test_another_adapter_than_the_attached_one_is_told(t5, tmp_path):
    given = lf.load(GOLDEN / "t5" / "adapter")
    attach(given, open_base(t5), tmp_path / "out")
    fewer = lf.Adapter(dict(list(given.items())[1:]))
    assert {p.rule for p in verify(open_base(t5), fewer, open_base(tmp_path / "out")).problems} == {"LF-611"}


def test_a_merged_folder_is_proved_by_running(run, t5):
    told = run("merge", GOLDEN / "t5" / "adapter", "--into", t5, "-o", "merged", "--verify")
    assert told.code == 0, told.err
    assert "max rel err" in told.err


def test_what_no_target_is_in_is_copied_byte_for_byte(tmp_path):
    merge(whole("pipeline", "text_encoder"), open_base(PIPELINE), tmp_path / "out")
    names = {p.relative_to(PIPELINE).as_posix() for p in PIPELINE.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()} == names
    differs = {n for n in names if (PIPELINE / n).read_bytes() != (tmp_path / "out" / n).read_bytes()}
    assert differs == {"text_encoder/model.onnx"}


def test_every_file_that_has_a_module_is_found_and_no_other():
    found = open_base(T5).resolve(lf.load(GOLDEN / "t5" / "adapter"), lf.Hints()).require().targets
    assert len(found) == 23
    decoders = {"decoder_model.onnx", "decoder_model_merged.onnx"}
    for key, places in found.items():
        files = {place.file for place in places}
        if key.startswith("encoder."):
            assert files == {"encoder_model.onnx"}, key
            assert "prefix: the graph's names are the adapter's without encoder. in front" in places[0].evidence
        elif "EncDecAttention.k" in key or "EncDecAttention.v" in key:  # with a past, theirs is read from it
            assert files == decoders, key
        else:
            assert files == decoders | {"decoder_with_past_model.onnx"}, key


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_an_adapter_changes_half_of_the_folder(half, t5, tmp_path):
    loaded = lf.load(GOLDEN / "t5" / "adapter")
    own = lf.Adapter({key: update for key, update in loaded.items() if key.startswith(half)})
    plan = prepare("merge", [("default", own)], open_base(t5), Options(tmp_path / "out"))
    assert {step.partition(":")[0] for step in plan.steps} == {f.name for f in t5.glob(f"{half}*.onnx")}
    assert {f for f in t5.iterdir() if not f.name.startswith(half)} <= set(plan.copies)


def test_one_part_that_cannot_be_changed_stops_all(tmp_path):
    quantised = (
        'g (float[N,6] x) => (float[N,6] y) <float[6] s> { f = DequantizeLinear(q, s) ["/q/MatMul"] y = MatMul(x, f) }'
    )
    second = model(quantised)
    second.graph.initializer.append(numpy_helper.from_array(np.ones((6, 6), np.int8), "q"))
    base = folder(tmp_path, first=one("/k/MatMul", 1), second=second)
    with pytest.raises(lf.LoraFormatError, match=r"LF-608  second\.onnx: .*its weight is INT8, quantised"):
        merge(adapter({"k.weight": (6, 6), "q.weight": (6, 6)}), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A part must not be passed over.


def anonymous(path):
    """The model without a name that tells a module: as a quantiser leaves it."""
    made = onnx.load(path)
    for i, node in enumerate(made.graph.node):
        node.name = f"n{i}"
    onnx.save(made, path)


def with_sketches(loaded, folder):
    """The adapter with the sketches of the weights that the graphs have."""
    base = open_base(folder)
    found = base.resolve(loaded, lf.Hints()).require().targets
    drawn = {k: sketch(base.read(f"{m[0].file}:{m[0].weight}"), m[0].placement) for k, m in found.items()}
    linear = {k: lf.Placement(u.matrix_shape(), (0,), (1,)) for k, u in loaded.items()}
    return lf.Adapter({k: lf.Update(u.parts, linear[k], sketch=drawn[k]) for k, u in loaded.items()})


def test_a_part_without_names_is_not_passed_over(t5):
    anonymous(t5 / "decoder_with_past_model.onnx")
    loaded = lf.load(GOLDEN / "t5" / "adapter")
    found = open_base(t5).resolve(loaded, lf.Hints())
    doubtful = {p.where for p in found.ambiguous}
    assert doubtful == {key for key in loaded if not key.startswith("encoder.")}
    assert {p.rule for p in found.ambiguous} == {"LF-603"}
    assert "decoder_with_past_model.onnx has" in found.ambiguous[0].what


def test_a_part_without_names_is_found_by_sketches(t5, tmp_path):
    loaded = with_sketches(lf.load(GOLDEN / "t5" / "adapter"), t5)
    anonymous(t5 / "decoder_with_past_model.onnx")
    truth = load_file(GOLDEN / "t5" / "truth.safetensors")
    merge(loaded, open_base(t5), tmp_path / "out")
    _, _, step = generated(tmp_path / "out", truth)
    assert relative_error(step, truth["adapted.logits"][:, -1:]) <= 1e-5


PACKED = {
    "MatMulBnb4": "y = com.microsoft.MatMulBnb4 <K = 6, N = 6, block_size = 16, quant_type = 1> (x, q, s)",
    "MatMulInteger": "i = Cast <to = 2> (x) z = MatMulInteger(i, q) y = Cast <to = 1> (z)",
}


@pytest.mark.parametrize("op", PACKED)
def test_a_part_with_packed_weights_that_have_no_name_is_not_passed_over(op, tmp_path):
    second = model(f"g (float[N,6] x) => (float[N,6] y) <float[6] s> {{ {PACKED[op]} }}")
    second.graph.initializer.append(numpy_helper.from_array(np.ones((6, 6), np.uint8), "q"))
    base = folder(tmp_path, first=one("/q/MatMul", 1), second=second)
    assert "second.onnx has 1 packed weights" in only_problem(base, "q.weight").what


def test_a_part_with_a_quantised_weight_that_has_no_name_is_not_passed_over(tmp_path):
    op = "y = com.microsoft.MatMulNBits <K = 6, N = 6, bits = 4, block_size = 16> (x, q, s)"
    second = model(f"g (float[N,6] x) => (float[N,6] y) <float[6] s> {{ {op} }}")
    second.graph.initializer.append(numpy_helper.from_array(np.ones((6, 1, 8), np.uint8), "q"))
    base = folder(tmp_path, first=one("/q/MatMul", 1), second=second)
    assert "second.onnx has 1 weights of its shape without a module's name" in only_problem(base, "q.weight").what


def test_parts_without_names_are_found_by_the_base(tmp_path):
    w, other = (np.random.default_rng(i).standard_normal((6, 6)).astype(np.float32) for i in range(2))
    made = {}
    for name, first, second in (("a", w, other), ("b", other, w), ("c", other, other)):
        made[name] = model("g (float[N,6] x) => (float[N,6] y) { h = MatMul(x, w0)  y = MatMul(h, w1) }")
        stored = {"w0": first.T, "w1": second.T}
        made[name].graph.initializer.extend(numpy_helper.from_array(v.copy(), n) for n, v in stored.items())
    base = folder(tmp_path, **made)
    save_file({"q.weight": w}, tmp_path / "base.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert only_problem(base, "q.weight").rule == "LF-602"
    hints = lf.Hints(base=open_base(tmp_path / "base.safetensors"))
    (places,) = base.resolve(adapter({"q.weight": (6, 6)}), hints).require().targets.values()
    assert [(place.file, place.weight) for place in places] == [("a.onnx", "w0"), ("b.onnx", "w1")]


def test_components_without_names_are_found_by_those_of_the_base(tmp_path):
    own = {c: np.random.default_rng(i).standard_normal((6, 6)).astype(np.float32) for i, c in enumerate(COMPONENTS)}
    other = np.random.default_rng(9).standard_normal((6, 6)).astype(np.float32)
    for component, weight in own.items():  # q.weight is another tensor in each
        made = model("g (float[N,6] x) => (float[N,6] y) { h = MatMul(x, w0)  y = MatMul(h, w1) }")
        stored = {"w0": other.T, "w1": weight.T}
        made.graph.initializer.extend(numpy_helper.from_array(v.copy(), n) for n, v in stored.items())
        (tmp_path / "graphs" / component).mkdir(parents=True)
        save(made, tmp_path / "graphs" / component / "model.onnx")
        (tmp_path / "base" / component).mkdir(parents=True)
        save_file({"q.weight": weight}, tmp_path / "base" / component / "model.safetensors")
        (tmp_path / "base" / component / "config.json").write_text('{"model_type": "bert"}')
    for name in ("graphs", "base"):
        (tmp_path / name / "model_index.json").write_text(json.dumps({c: ["diffusers", "Model"] for c in own}))
    keys = {f"{component}:q.weight": (6, 6) for component in own}
    both = lf.Adapter(adapter(keys).targets, components=tuple(own))
    graphs, hints = open_base(tmp_path / "graphs"), lf.Hints(base=open_base(tmp_path / "base"))
    assert '{"unet:q.weight": "NODE OR WEIGHT"}' in graphs.resolve(both, lf.Hints()).unresolved[-1].fix
    found = graphs.resolve(both, hints).require().targets
    places = {key: [(place.file, place.weight) for place in places] for key, places in found.items()}
    assert places == {f"{c}:q.weight": [(f"{c}/model.onnx", "w1")] for c in own}


def test_files_whose_names_tell_nothing_are_not_guessed_at(t5):
    for i, file in enumerate(sorted(t5.glob("*.onnx"))):
        file.rename(t5 / f"part{i}.onnx")
    loaded = lf.load(GOLDEN / "t5" / "adapter")
    found = open_base(t5).resolve(loaded, lf.Hints())
    failed = {p.where for p in (*found.unresolved, *found.ambiguous)}
    assert failed >= {key for key in loaded if key.startswith("encoder.")}


def one(name, seed, size=6):
    """A graph of one MatMul."""
    text = f'g (float[N,{size}] x) => (float[N,{size}] y) <float[{size},{size}] w> {{ ["{name}"] y = MatMul(x, w) }}'
    return model(text, seed=seed)


def folder(tmp_path, **files):
    made = tmp_path / "models"
    made.mkdir()
    for name, graph in files.items():
        save(graph, made / f"{name}.onnx")
    return open_base(made)


def only_problem(base, key, **hints):
    found = base.resolve(adapter({key: (6, 6)}), lf.Hints(**hints))
    problems = [*found.unresolved, *found.ambiguous]
    assert len(problems) == 1, problems
    return problems[0]


def test_one_name_for_two_weights_in_two_parts_means_neither(tmp_path):
    base = folder(tmp_path, encoder_model=one("/layers.0/q/MatMul", 1), decoder_model=one("/layers.0/q/MatMul", 2))
    problem = only_problem(base, "layers.0.q.weight")
    assert problem.rule == "LF-603"
    assert "decoder_model.onnx and encoder_model.onnx have different weights" in problem.what


def test_a_scale_that_was_folded_into_the_weight_of_one_part_makes_it_another_one(tmp_path):
    first, second = (one("/layers.0/q/MatMul", 1) for _ in range(2))
    half = 0.5 * numpy_helper.to_array(second.graph.initializer[0])
    second.graph.initializer[0].CopyFrom(numpy_helper.from_array(half, "w"))
    problem = only_problem(folder(tmp_path, first=first, second=second), "layers.0.q.weight")
    assert (problem.rule, "different weights" in problem.what) == ("LF-603", True)


def test_one_name_for_one_weight_in_two_parts_is_one_target(tmp_path):
    base = folder(tmp_path, first=one("/layers.0/q/MatMul", 1), second=one("/layers.0/q/MatMul", 1))
    (places,) = base.resolve(adapter({"layers.0.q.weight": (6, 6)}), lf.Hints()).require().targets.values()
    assert [place.file for place in places] == ["first.onnx", "second.onnx"]


@pytest.mark.parametrize("key", ["encoder.layers.0.q.weight", "model.encoder.layers.0.q.weight"])
def test_a_files_name_tells_which_prefix_it_lacks(key, tmp_path):
    base = folder(tmp_path, encoder_model=one("/layers.0/q/MatMul", 1), decoder_model=one("/layers.0/q/MatMul", 2))
    (places,) = base.resolve(adapter({key: (6, 6)}), lf.Hints()).require().targets.values()
    assert [place.file for place in places] == ["encoder_model.onnx"]


def test_a_file_beside_the_one_that_the_target_is_of_is_not_changed(tmp_path):
    """An exported encoder and decoder both call their modules layers.0: each fits without its beginning."""
    folder(tmp_path, encoder_model=one("/layers.0/q/MatMul", 1), decoder_model=one("/layers.0/q/MatMul", 2))
    files = {name: open_base(tmp_path / "models" / f"{name}_model.onnx") for name in ("encoder", "decoder")}
    key = "model.decoder.layers.0.q.weight"
    problem = only_problem(files["encoder"], key)
    assert problem.rule == "LF-603"
    assert "encoder_model.onnx has it without model.decoder. in front" in problem.what
    for name, hints in (("decoder", {}), ("encoder", {"names": {key: "layers.0.q"}})):
        assert files[name].resolve(adapter({key: (6, 6)}), lf.Hints(**hints)).require().targets.keys() == {key}


def test_a_files_name_is_matched_by_whole_words(tmp_path):
    base = folder(tmp_path, encoder_model=one("/layers.0/q/MatMul", 1), decoder_model=one("/layers.0/q/MatMul", 2))
    problem = only_problem(base, "encoder_attn.layers.0.q.weight")
    assert problem.rule == "LF-602"


def test_a_number_in_a_files_name_is_no_layer(tmp_path):
    base = folder(tmp_path, part_0=one("/q/MatMul", 1), part_1=one("/q/MatMul", 2))
    assert only_problem(base, "layers.0.q.weight").rule == "LF-602"


def test_a_part_that_may_have_the_target_under_another_name_is_told(tmp_path):
    base = folder(tmp_path, text=one("/tower/q/MatMul", 1), image=one("/m/tower/q/MatMul", 1))
    problem = only_problem(base, "tower.q.weight")
    assert problem.rule == "LF-603"
    assert "image.onnx has m.tower.q.weight" in problem.what
    # The user's word is of one file; the other has the target's own name.
    told = only_problem(base, "tower.q.weight", names={"tower.q.weight": "m.tower.q.weight"})
    assert "text.onnx has tower.q.weight" in told.what


def test_a_target_in_no_file_is_told_with_what_the_files_have(tmp_path):
    base = folder(tmp_path, encoder_model=one("/layers.0/q/MatMul", 1), decoder_model=one("/layers.0/k/MatMul", 2))
    problem = only_problem(base, "encoder.layers.0.qq.weight")
    assert problem.rule == "LF-602"
    assert problem.what.startswith("encoder_model.onnx: no node or weight")
    assert "nearest: layers.0.q" in problem.what


# Components.


def two_encoders(tmp_path):
    made = tmp_path / "models"
    shutil.copytree(PIPELINE, made)
    shutil.copytree(made / "text_encoder", made / "text_encoder_2")
    index = json.loads((made / "model_index.json").read_text())
    (made / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": index["text_encoder"]}))
    return made


def test_a_component_is_not_another_one_that_has_the_same_names(tmp_path):
    base = open_base(two_encoders(tmp_path))
    own = whole("pipeline", "text_encoder")
    merge(own, base, tmp_path / "out")
    assert (tmp_path / "out/text_encoder_2/model.onnx").read_bytes() == (
        tmp_path / "models/text_encoder/model.onnx"
    ).read_bytes()
    plain = base.resolve(lf.load(GOLDEN / "pipeline" / "adapter" / "text_encoder"), lf.Hints())
    assert {p.rule for p in plain.ambiguous} == {"LF-603"}
    assert len(plain.ambiguous) == len(own)
    assert "two components" in plain.ambiguous[0].what


def test_an_adapter_of_one_component_needs_no_prefix_where_only_one_has_its_modules():
    found = open_base(PIPELINE).resolve(lf.load(GOLDEN / "pipeline" / "adapter" / "unet"), lf.Hints()).require()
    assert {m.file for places in found.targets.values() for m in places} == {"unet/model.onnx"}


def test_the_two_halves_of_an_autoencoder_are_one_component():
    assert list(open_base(PIPELINE).components) == ["text_encoder", "unet", "vae"]
    update = adapter({"vae:decoder.mid_block.attentions.0.to_q.weight": (4, 4)})
    found = open_base(PIPELINE).resolve(lf.Adapter(update.targets, components=("vae",)), lf.Hints())
    (places,) = found.require().targets.values()
    assert [place.file for place in places] == ["vae_decoder/model.onnx"]


def test_a_component_that_the_folder_lacks_is_an_error():
    own = whole("pipeline", "text_encoder")
    moved = {key.replace("text_encoder:", "transformer:"): update for key, update in own.items()}
    found = open_base(PIPELINE).resolve(lf.Adapter(moved, components=("transformer",)), lf.Hints())
    assert {p.rule for p in found.unresolved} == {"LF-602"}
    assert len(found.unresolved) == len(own)
    assert "it has: text_encoder, unet, vae" in found.unresolved[0].what


def test_a_target_that_no_component_has_is_one_error_with_what_each_says():
    found = open_base(PIPELINE).resolve(adapter({"mid_block.attentions.0.to_qq.weight": (4, 4)}), lf.Hints())
    (problem,) = found.unresolved
    assert problem.rule == "LF-602"
    assert "unet: no node or weight" in problem.what
    assert "vae: " in problem.what


def test_the_users_map_is_in_the_keys_of_the_adapter():
    own = whole("pipeline", "unet", "text_encoder")
    renamed = {key.replace("text_model.encoder", "tower"): update for key, update in own.items()}
    hints = lf.Hints({"text_encoder:tower.*": "text_model.encoder.*"})
    found = open_base(PIPELINE).resolve(lf.Adapter(renamed, components=own.components), hints).require()
    assert len(found.targets) == len(own)


def test_a_fresh_adapter_of_a_pipeline_names_its_components(tmp_path):
    base = open_base(PIPELINE)
    fresh = lf.init(base, ["q_proj", "to_k"], rank=2, alpha=2)
    assert set(fresh.components) == {"text_encoder", "unet", "vae"}
    lf.save(fresh, tmp_path / "fresh.safetensors")
    again = lf.load(tmp_path / "fresh.safetensors")
    assert base.resolve(again, lf.Hints()).require().targets.keys() == fresh.keys()


# What is written.


def test_the_output_may_not_lie_in_the_base(t5):
    for out in (t5, t5 / "out"):
        with pytest.raises(lf.LoraFormatError, match="LF-703"):
            merge(lf.load(GOLDEN / "t5" / "adapter"), open_base(t5), out)


def test_a_folder_with_data_files_is_replaced_by_that_of_another_adapter(t5, tmp_path):
    for name in ("encoder_model", "decoder_model"):
        made = onnx.load(t5 / f"{name}.onnx")
        onnx.save(made, t5 / f"{name}.onnx", save_as_external_data=True, location=f"{name}.data", size_threshold=0)
    loaded = lf.load(GOLDEN / "t5" / "adapter")
    for verb, run in VERBS.items():
        run(lf.Adapter({k: u for k, u in loaded.items() if k[0] == "e"}), open_base(t5), tmp_path / verb)
        run(loaded, open_base(t5), tmp_path / verb, force=True)
        run(loaded, open_base(t5), tmp_path / verb, force=True)
        truth = load_file(GOLDEN / "t5" / "truth.safetensors")
        assert relative_error(generated(tmp_path / verb, truth)[2], truth["adapted.logits"][:, -1:]) <= 1e-5
        assert {p.name for p in (tmp_path / verb).iterdir()} == {p.name for p in t5.iterdir()}


def test_a_data_file_of_two_models_is_taken_apart_where_one_of_them_changes(t5, tmp_path):
    from onnx import external_data_helper

    names, model = ("encoder_model", "decoder_model"), {}
    for name in names:
        model[name] = onnx.load(t5 / f"{name}.onnx")
        external_data_helper.convert_model_to_external_data(model[name], location="both.data", size_threshold=0)
    for name in names:  # one after the other into the same file
        onnx.save(model[name], t5 / f"{name}.onnx")
    loaded, truth = lf.load(GOLDEN / "t5" / "adapter"), load_file(GOLDEN / "t5" / "truth.safetensors")
    half = lf.Adapter({k: u for k, u in loaded.items() if k[0] == "e"})
    merge(half, open_base(t5), tmp_path / "half")
    merge(lf.Adapter({k: u for k, u in loaded.items() if k[0] != "e"}), open_base(tmp_path / "half"), tmp_path / "out")
    assert relative_error(generated(tmp_path / "out", truth)[2], truth["adapted.logits"][:, -1:]) <= 1e-5
    merge(loaded, open_base(t5), tmp_path / "whole")
    assert relative_error(generated(tmp_path / "whole", truth)[2], truth["adapted.logits"][:, -1:]) <= 1e-5


def test_external_data_goes_with_the_part_that_refers_to_it(t5, tmp_path):
    for name in ("encoder_model", "decoder_model"):
        made = onnx.load(t5 / f"{name}.onnx")
        onnx.save(made, t5 / f"{name}.onnx", save_as_external_data=True, location=f"{name}.data", size_threshold=0)
    loaded = lf.load(GOLDEN / "t5" / "adapter")
    merge(lf.Adapter({k: u for k, u in loaded.items() if k[0] == "e"}), open_base(t5), tmp_path / "half")
    names = {p.name for p in (tmp_path / "half").iterdir()}
    assert "decoder_model.data" in names
    assert "encoder_model.data" in names
    for verb, run in VERBS.items():
        run(loaded, open_base(t5), tmp_path / verb)
        truth = load_file(GOLDEN / "t5" / "truth.safetensors")
        assert relative_error(generated(tmp_path / verb, truth)[2], truth["adapted.logits"][:, -1:]) <= 1e-5


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "fifo"])
def test_a_folder_that_leads_elsewhere_is_refused(kind, t5, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("private")
    made = t5 / "notes.txt"
    match kind:
        case "file":
            made.symlink_to(tmp_path / "secret" / "key")
        case "folder":
            made.symlink_to(tmp_path / "secret")
        case "dangling":
            made.symlink_to(t5 / "nowhere")
        case "fifo":
            os.mkfifo(made)
    with pytest.raises(lf.LoraFormatError, match=r"LF-610  it is .*@ notes\.txt"):
        open_base(t5)


def test_a_link_within_the_folder_is_a_file_and_what_git_keeps_is_left(t5, tmp_path):
    (t5 / "notes.txt").symlink_to("config.json")
    (t5 / ".git").mkdir()
    (t5 / ".git" / "HEAD").write_text("ref")
    merge(lf.load(GOLDEN / "t5" / "adapter"), open_base(t5), tmp_path / "out")
    assert not (tmp_path / "out" / "notes.txt").is_symlink()
    assert (tmp_path / "out" / "notes.txt").read_bytes() == (t5 / "config.json").read_bytes()
    assert not (tmp_path / "out" / ".git").exists()


def test_a_download_of_the_hub_is_a_folder_of_links_to_its_blobs(t5, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in t5.iterdir():
        shutil.copy(file, blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    merge(lf.load(GOLDEN / "t5" / "adapter"), open_base(snapshot), tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == len(list(t5.iterdir()))


def test_a_folder_of_one_model_is_written_as_a_folder(tmp_path):
    folder(tmp_path, model=one("/enc/q/MatMul", 1))
    (tmp_path / "models" / "config.json").write_text("{}")
    merge(adapter({"enc.q.weight": (6, 6)}), open_base(tmp_path / "models"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.onnx"]


def test_the_commands_take_a_folder(run, t5):
    told = run("resolve", GOLDEN / "t5" / "adapter", "--in", t5)
    assert told.code == 0
    assert "2 × encoder.block.*.layer.*.SelfAttention.q.weight\n    → encoder_model.onnx: /block.*/" in told.out
    told = run("merge", GOLDEN / "t5" / "adapter", "--into", t5, "-o", "merged")
    assert told.code == 0
    assert "23/23 targets by node_name" in told.err
    assert "3 of 3 models change, 2 files are copied as they are" in told.err
    assert run("merge", GOLDEN / "t5" / "adapter", "--into", t5, "-o", "merged").code == 1
    assert run("merge", GOLDEN / "t5" / "adapter", "--into", t5, "-o", "merged", "--force").code == 0


def test_a_stub_for_what_was_not_found_names_nothing_until_it_is_filled_in(run, tmp_path):
    base = save(one("/encoder/query/MatMul", 1), tmp_path / "base.onnx")
    lf.save(adapter({"encoder.qery.weight": (6, 6)}), tmp_path / "a.safetensors")
    assert run("resolve", "a.safetensors", "--in", base, "--names-stub", "names.json").code == 1
    stub = json.loads((tmp_path / "names.json").read_text())
    assert stub == {"encoder.qery.weight": "CHOOSE: encoder.query.weight"}
    assert run("resolve", "a.safetensors", "--in", base, "--names", "names.json").code == 1
    (tmp_path / "names.json").write_text(json.dumps({"encoder.qery.weight": "encoder.query.weight"}))
    assert run("resolve", "a.safetensors", "--in", base, "--names", "names.json").code == 0
