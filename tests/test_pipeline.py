"""A pipeline of diffusers as one base: each component's targets in its own folder, and everything else as it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers_goldens import golden
from mutants import net
from refused import rules_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat.axes import Placement
from loraformat.checkpoint import pipeline
from loraformat.testing import relative_error
from loraformat.verbs.retarget import retarget

OTHERS = {"scheduler/scheduler_config.json": "{}", "tokenizer/vocab.json": '{"a": 0}', "README.md": "a pipeline"}

DIFFUSERS = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1"}
CONFIGS = {"unet": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": {"model_type": "clip_text_model"}}


def pipeline_of(folder, components, more=()):
    """A folder with ``model_index.json``; ``components``: name → tensors."""
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {name: ["diffusers", "Model"] for name in (*components, *more)} | {"safety_checker": [None, None]}
    for name, text in {**OTHERS, "model_index.json": json.dumps(index)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, tensors in components.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIGS[name]))
        stem = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        save_file(tensors, folder / name / f"{stem}.safetensors")
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder):
    return {c: load_file(next((folder / c).glob("*.safetensors"))) for c in ("unet", "text_encoder", "vae")}


def golden_base(folder, case="sd"):
    """A pipeline of zeros for everything that the golden's adapter changes, and a component that it does not."""
    _, deltas, _ = golden(case)
    components = {"vae": {"conv.weight": np.ones((3, 2), np.float32)}}
    for key, delta in deltas.items():
        component, _, name = key.partition(":")
        components.setdefault(component, {})[name] = np.zeros_like(delta)
        components[component]["untouched.weight"] = np.full((5, 4), 0.5, np.float32)
    return pipeline_of(folder, components), deltas


def check_merged(folder):
    """What diffusers adds to each component's weights is what is merged into them."""
    base, deltas = golden_base(folder / "base")
    opened = lf.open_base(base)
    adapter = retarget(lf.load(golden("sd")[0]), base=opened).adapter
    assert set(adapter) == set(deltas)
    outcome = lf.merge(adapter, opened, folder / "out")
    assert set(outcome.norms) == set(adapter)
    before, after = contents(base), contents(folder / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    found = weights(folder / "out")
    for key, delta in deltas.items():
        component, _, name = key.partition(":")
        assert relative_error(found[component].pop(name), delta) <= 1e-6, key
    assert all(list(tensors) in (["untouched.weight"], ["conv.weight"]) for tensors in found.values())
    verdict = lf.verify(opened, adapter, lf.open_base(folder / "out"))
    assert not verdict.problems
    assert verdict.untouched == 3


def one_component_for_all(patch):
    real = lf.Adapter.of_component
    patch.setattr(lf.Adapter, "of_component", lambda adapter, component: real(adapter, "unet"))


def the_rest_forgotten(patch):
    patch.setattr(pipeline.Pipeline, "_rest", lambda self, plans: [])


test_the_golden, test_a_mutant_turns_it_red = net(
    {"merged": check_merged},
    [(mutant, "merged") for mutant in (one_component_for_all, the_rest_forgotten)],
)


DRAW = np.random.default_rng(7)


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def twins(folder):
    """Two components that have a parameter of one name, and one of its own each."""
    unet = {"to_q.weight": normal(7, 5), "conv_in.weight": normal(6, 3)}
    text = {"to_q.weight": normal(7, 5), "fc1.weight": normal(9, 4)}
    return pipeline_of(folder, {"unet": unet, "text_encoder": text, "vae": {"conv.weight": normal(3, 2)}})


def pair(out, in_):
    place = Placement((out, in_), (0,), (1,))
    return lf.Update((lf.Lora(normal(2, in_), normal(out, 2), 3.0, "alpha/r"),), place)


def test_an_adapter_of_one_model_goes_into_the_component_that_has_all_of_it(tmp_path):
    base = lf.open_base(twins(tmp_path / "base"))
    adapter = lf.Adapter({"to_q.weight": pair(7, 5), "fc1.weight": pair(9, 4)})
    lf.merge(adapter, base, tmp_path / "out")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert relative_error(after["text_encoder"]["to_q.weight"], adapter["to_q.weight"].apply(before["text_encoder"]["to_q.weight"])) <= 1e-6  # fmt: skip
    assert after["unet"]["to_q.weight"].tobytes() == before["unet"]["to_q.weight"].tobytes()
    both = lf.Adapter({"to_q.weight": pair(7, 5)})
    assert rules_of(lf.merge, both, base, tmp_path / "b") == {"LF-603"}
    assert rules_of(lf.merge, lf.Adapter({"nowhere.weight": pair(7, 5)}), base, tmp_path / "b") == {"LF-602"}


def test_what_is_not_there_is_named_with_its_component(tmp_path):
    base = lf.open_base(twins(tmp_path / "base"))
    targets = {"unet:to_k.weight": pair(7, 5), "transformer:to_q.weight": pair(7, 5), "unet:conv_in.weight": pair(5, 3)}
    adapter = lf.Adapter(targets, components=("unet", "transformer"))
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.merge(adapter, base, tmp_path / "out")
    said = {p.where: p for p in caught.value.problems}
    assert {where: p.rule for where, p in said.items() if p.rule == "LF-602"} == {
        "unet:to_k.weight": "LF-602",
        "transformer:to_q.weight": "LF-602",
    }
    assert "text_encoder" in said["transformer:to_q.weight"].what
    assert not (tmp_path / "out").exists()


def test_names_and_axes_are_stated_by_component(tmp_path):
    base = lf.open_base(twins(tmp_path / "base"))
    adapter = lf.Adapter({"unet:to_k.weight": replace(pair(7, 5), placement=None)}, components=("unet",))
    for names in ({"unet:to_k.weight": "unet:to_q.weight"}, {"unet:to_k.weight": "to_q.weight"}):
        found = base.resolve(adapter, lf.Hints(names, {"unet:*": "out,in"})).require()
        assert [m.weight for m in found.targets["unet:to_k.weight"]] == ["unet:to_q.weight"]
    assert base.resolve(adapter, lf.Hints({"text_encoder:x": "y"})).unresolved


def test_the_output_lies_apart_and_replaces_nothing(tmp_path):
    base = lf.open_base(twins(tmp_path / "base"))
    adapter = lf.Adapter({"unet:to_q.weight": pair(7, 5)}, components=("unet",))
    assert rules_of(lf.merge, adapter, base, tmp_path / "base" / "out") == {"LF-703"}
    (tmp_path / "out").mkdir()
    assert rules_of(lf.merge, adapter, base, tmp_path / "out") == {"LF-702"}


def test_the_commands_know_it(run, tmp_path):
    twins(tmp_path / "base")
    adapter = lf.Adapter({"unet:to_q.weight": pair(7, 5)}, components=("unet",))
    lf.save(adapter, tmp_path / "a.safetensors")
    told = run("info", "base")
    assert told.code == 0
    assert "base/text_encoder: checkpoint" in told.out
    told = run("merge", "a.safetensors", "--into", "base", "-o", "out", "--plan")
    assert "1 of 3 components change" in told.out + told.err
    assert run("merge", "a.safetensors", "--into", "base", "-o", "out", "--verify").code == 0
    assert run("verify", "--base", "base", "--adapter", "a.safetensors", "--merged", "out").code == 0
    assert run("verify", "--base", "base", "--adapter", "a.safetensors", "--merged", "base").code == 1
    bound = run("bind", "a.safetensors", "--base", "base", "-o", "bound.safetensors")
    assert bound.code == 0, bound.err
    assert lf.load(tmp_path / "bound.safetensors")["unet:to_q.weight"].base_sha256
    other = twins(tmp_path / "other")
    told = run("merge", "bound.safetensors", "--into", other, "-o", "no")
    assert (told.code, "LF-607" in told.err) == (1, True)


def test_a_name_that_leads_out_of_the_folder_is_no_component(tmp_path):
    twins(tmp_path / "base")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    for name in ("..", ".", "../base/unet", "unet/../vae"):
        index[name] = ["diffusers", "Model"]
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    assert sorted(lf.open_base(tmp_path / "base").components) == ["text_encoder", "unet", "vae"]
