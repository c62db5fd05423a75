"""Tinker: what its cookbook merges is what is read, experts shared on one side included."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from mutants import net
from peft_goldens import adapter_of
from refused import rules_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.axes import Placement
from loraformat.parts import Delta
from loraformat.source import open_source
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget
from loraformat_converters.tinker import NAMES, layout, read, write
from loraformat_converters.tinker import space as spaces

HERE = Path(__file__).parent / "golden/tinker"
QWEN = {"model_type": "qwen3_moe"}


def check_deltas(folder=None):
    adapter = lf.load(HERE / "adapter")
    assert adapter.names == NAMES
    found = retarget(adapter, "torch", config=QWEN).adapter
    truth = {n.removeprefix("delta."): t for n, t in load_file(HERE / "truth.safetensors").items()}
    testing.check_golden(found, truth)
    base = lf.open_base(HERE / "base.safetensors")
    assert not base.resolve(found, lf.Hints()).unresolved


def a_and_b_swapped(patch):
    patch.setattr(read, "_ENDINGS", {".lora_A.weight": "lora_B", ".lora_B.weight": "lora_A"})


def alpha_as_the_scale(patch):
    patch.setattr(read.Loose, "scale", lambda self, module, r: (self.alpha, "factor"))


def up_for_gate(patch):
    patch.setattr(spaces, "_LEAVES", {"w1": "up_proj", "w2": "down_proj", "w3": "gate_proj"})


def experts_turned(patch):
    real = read.Placement

    def turned(shape, out, in_, batch=()):
        return real(shape, in_, out, batch) if batch and shape[1] == shape[2] else real((shape[0], *shape[:0:-1]), in_, out, batch) if batch else real(shape, out, in_)  # fmt: skip

    patch.setattr(read, "Placement", turned)


def check_rewritten(folder):
    """What was read of a download is written as it was."""
    save(lf.load(HERE / "adapter"), folder / "out", layout)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert load(folder / "out" / name) == load(HERE / "adapter" / name)


def load(path):
    if path.suffix == ".json":
        return path.read_text()
    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in load_file(path).items()}


def check_from_torch(folder):
    """From the names of Hugging Face, experts one by one: the tensors' names and shapes, and what they compute."""
    known = QWEN | {"num_experts": 3}
    adapter = retarget(lf.load(HERE / "adapter"), "torch", config=known).adapter
    there = retarget(replace(adapter, extensions={}), NAMES, config=known).adapter
    save(there, folder / "out", layout)
    again = lf.load(folder / "out")
    assert again.names == NAMES
    found = retarget(again, "torch", config=known).adapter
    truth = {n.removeprefix("delta."): t for n, t in load_file(HERE / "truth.safetensors").items()}
    testing.check_golden(found, truth)
    testing.check_claimed_alone(layout, folder / "out")


def another_prefix(patch):
    patch.setattr(write, "PREFIX", "")


def the_rank_forgotten(patch):
    patch.setattr(write, "alpha_for", lambda scale, r: scale)


def the_next_expert(patch):
    real = spaces.Seat
    patch.setattr(spaces, "Seat", lambda name, **words: real(name, **turned(words)))

    def turned(words):
        return words | ({"index": ((words["index"][0] + 1) % 3, 3)} if "index" in words else {})


test_the_golden, test_a_mutant_turns_its_check_red = net(
    {"merge": lambda folder: check_deltas(), "rewritten": check_rewritten, "from torch": check_from_torch},
    [
        *((mutant, "merge") for mutant in (a_and_b_swapped, alpha_as_the_scale, up_for_gate, experts_turned)),
        (another_prefix, "rewritten"),
        (the_rank_forgotten, "from torch"),
        (the_next_expert, "merge"),
    ],
)


def test_what_tinker_has_no_place_for_is_refused(tmp_path):
    adapter = lf.load(HERE / "adapter")
    stack, flat = (next(key for key in adapter if word in key) for word in ("experts", "q_proj"))
    wrong = {
        "a stack elsewhere": {flat: adapter[stack]},
        "no stack of experts": {stack: adapter[flat]},
        "a bias": {"model.a.bias": adapter[flat]},
        "a dense change": {flat: lf.Update((Delta(normal(24, 20)),))},
        "two scales": {**adapter, flat: replace(adapter[flat], parts=(replace(adapter[flat]["lora"], alpha=9.0),))},
        "two ranks": {**adapter, flat: lf.Update((lf.Lora(normal(3, 20), normal(24, 3), 7 / 4, "factor"),))},
    }
    for targets in wrong.values():
        assert rules_of(save, replace(adapter, targets=targets), tmp_path / "out", layout) == {"LF-508"}
    torch = replace(adapter, names="torch")
    assert rules_of(save, torch, tmp_path / "out", layout) == {"LF-508"}
    assert not (tmp_path / "out").exists()


def test_experts_that_share_both_factors_get_one_each(tmp_path):
    stack = "model.layers.0.mlp.experts.w1.weight"
    part = lf.Lora(normal(1, 4, 20), normal(1, 14, 4), 7, "alpha/r")
    adapter = lf.Adapter({stack: lf.Update((part,), Placement((3, 14, 20), (1,), (2,), (0,)))}, NAMES)
    save(adapter, tmp_path / "out", layout)
    found = lf.load(tmp_path / "out")[stack]
    assert found["lora"].lora_B.shape == (3, 14, 4)
    assert testing.relative_error(found.matrix(), np.repeat(adapter[stack].matrix(), 3, 0)) <= 1e-6


def test_the_golden_is_claimed_by_tinker_alone_and_pefts_by_peft():
    testing.check_claimed_alone(layout, HERE / "adapter")
    testing.check_claimed_alone(layout, HERE / "adapter/adapter_model.safetensors")
    testing.check_claimed_alone(registry.layout("peft"), adapter_of("llama"))


def changed(folder, config=None, **tensors):
    shutil.copytree(HERE / "adapter", folder)
    kept = load_file(folder / "adapter_model.safetensors")
    save_file(kept | {f"base_model.model.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    return folder


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_empty_experts_stand_for_nothing_and_are_told(tmp_path):
    empty = {f"model.layers.1.mlp.experts.w1.lora_{r}.weight": np.zeros((0, 4, 0), np.float32) for r in "AB"}
    reading, _, _ = registry.read(changed(tmp_path / "a", **empty))
    assert [w.rule for w in reading.warnings] == ["LF-311"]
    assert len(reading.adapter) == 6


def test_what_no_tool_of_tinkers_reads_is_refused(tmp_path):
    pair = {f"model.layers.1.mlp.experts.w1.lora_{r}.weight": normal(1, 4, 4) for r in "AB"}
    assert rules_of(lf.load, changed(tmp_path / "shared", **pair)) == {"LF-504"}
    assert rules_of(lf.load, changed(tmp_path / "stray", **{"model.norm.weight": normal(3)})) == {"LF-506"}
    flat = {f"model.layers.1.mlp.experts.w1.lora_{r}.weight": normal(4, 4) for r in "AB"}
    assert rules_of(lf.load, changed(tmp_path / "flat", **flat)) == {"LF-309"}
    for i, (config, rule) in enumerate(
        {
            "[": "LF-503", "{}": "LF-503", '{"r": 4}': "LF-503", '{"r": 4, "lora_alpha": true}': "LF-503",
            '{"r": 5, "lora_alpha": 7}': "LF-507", '{"r": 4, "lora_alpha": 7, "use_rslora": true}': "LF-504",
            f'{{"r": 4, "lora_alpha": {10**400}}}': "LF-503",
        }.items()
    ):  # fmt: skip
        assert rules_of(lf.load, changed(tmp_path / str(i), config)) == {rule}


def test_names_of_a_model_that_is_not_known_are_not_guessed(tmp_path):
    adapter = lf.load(HERE / "adapter")
    assert rules_of(retarget, adapter, "torch") == {"LF-604"}
    assert rules_of(retarget, adapter, "torch", config={"model_type": "gpt_oss"}) == {"LF-604"}
    tied = QWEN | {"tie_word_embeddings": True}
    assert rules_of(retarget, adapter, "torch", config=tied) == {"LF-602"}


def test_a_folder_goes_to_peft_by_the_command(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    told = run("convert", HERE / "adapter", "peft", "--base", "config.json")
    assert told.code == 0, told.err
    truth = load_file(HERE / "truth.safetensors")
    found = lf.load(tmp_path / "peft")
    assert {f"delta.{key}" for key in found} == truth.keys()
    for key, update in found.items():
        assert testing.relative_error(update.matrix(), truth[f"delta.{key}"]) <= 1e-6
    assert open_source(tmp_path / "peft").sidecar("adapter_config.json")
