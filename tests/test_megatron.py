"""Megatron-Bridge: its own checkpoints mean what its own modules computed, whatever cut them, and what it exports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutants import net
from refused import problems_of
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing
from loraformat.layout import ReadOptions
from loraformat.pickled import distributed
from loraformat.pickled.distributed import Distributed
from loraformat.source import open_source
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget
from loraformat_converters.megatron import NAMES, layout, read, space
from loraformat_converters.megatron.settings import Heads, heads_of_model, heads_of_run, method_of

HERE = Path(__file__).parent / "golden/megatron"
EXPORTED = ("lora", "lora_tensor_parallel", "lora_pipeline", "experts")
CASES = (*EXPORTED, "canonical", "canonical_experts", "canonical_tensor_parallel", "dora", "dora_tensor_parallel")
QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"


def base_of(case):
    return HERE / ("moe_base" if case.endswith("experts") else "base")


def config_of(case):
    return json.loads((base_of(case) / "config.json").read_text())


def in_torch(case):
    return retarget(lf.load(HERE / case / "checkpoint"), "torch", config=config_of(case)).adapter


def check_deltas(case):
    """ΔW of every parameter, as the wrapped modules computed it."""
    adapter, truth = in_torch(case), load_file(HERE / case / "truth.safetensors")
    assert adapter.keys() == truth.keys()
    weights = load_file(base_of(case) / "model.safetensors")
    for key, update in adapter.items():
        assert testing.relative_error(update.delta(weights[key]), truth[key]) < 1e-6, key


def check_export(case):
    """The tensors of the bridge's own export, bit for bit, at the same scale."""
    adapter, wanted = in_torch(case), lf.load(HERE / case / "peft")
    assert adapter.keys() == wanted.keys()
    for key, update in adapter.items():
        pair, other = update["lora"], wanted[key]["lora"]
        assert pair.lora_A.tobytes() == other.lora_A.tobytes(), key
        assert pair.lora_B.tobytes() == other.lora_B.tobytes(), key
        assert pair.scale == other.scale


CHECKS = {case: lambda folder, case=case: check_deltas(case) for case in CASES}
CHECKS |= {f"{case} exported": lambda folder, case=case: check_export(case) for case in EXPORTED}


def a_and_b_swapped(patch):
    patch.setattr(read, "_ENDINGS", {".linear_in.weight": "lora_B", ".linear_out.weight": "lora_A"})


def alpha_as_the_scale(patch):
    patch.setattr(read.Loose, "scale", lambda self, module, r: (self.alpha, "factor"))


def the_halves_as_they_are_stored(patch):
    patch.setattr(read, "from_halves", lambda stored, ranks: stored)


def the_halves_the_other_way(patch):
    patch.setattr(read, "from_halves", read.from_ranks)


def the_magnitude_as_it_is_stored(patch):
    patch.setattr(read, "from_ranks", lambda stored, ranks: stored)


def the_magnitude_the_other_way(patch):
    patch.setattr(read, "from_ranks", read.from_halves)


def the_chunks_exchanged(patch):
    """Each where the next one lies."""
    real = distributed.describe

    def wrong(*told):
        found = real(*told)
        pairs = zip(found.chunks, found.chunks[1:] + found.chunks[:1], strict=True)
        return replace(found, chunks=tuple(replace(next_one, offsets=chunk.offsets) for chunk, next_one in pairs))

    patch.setattr(distributed, "describe", wrong)


def up_for_gate(patch):
    patch.setattr(read, "_PARTS", read._PARTS | {"gate": "linear_fc1_up", "up": "linear_fc1_gate"})


def the_layers_backwards(patch):
    real = read._layers
    patch.setattr(read, "_layers", lambda key, t: real(key, {role: x[::-1] for role, x in t.items()}))


def queries_of_all_groups_first(patch):
    def rows(leaf, heads):
        total = heads.groups * (heads.queries + 2) * heads.size
        sizes = np.cumsum([0, heads.groups * heads.queries * heads.size, heads.groups * heads.size])
        start = sizes[("q_proj", "k_proj", "v_proj").index(leaf)]
        stop = total if leaf == "v_proj" else sizes[("q_proj", "k_proj").index(leaf) + 1]
        return np.arange(start, stop)

    patch.setattr(space, "_rows", rows)


def key_for_value(patch):
    real = space._rows
    patch.setattr(
        space, "_rows", lambda leaf, heads: real({"k_proj": "v_proj", "v_proj": "k_proj"}.get(leaf, leaf), heads)
    )


test_the_goldens, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (a_and_b_swapped, "lora"),
        (alpha_as_the_scale, "lora"),
        (alpha_as_the_scale, "experts exported"),
        (the_halves_as_they_are_stored, "canonical_tensor_parallel"),
        (the_halves_the_other_way, "canonical_tensor_parallel"),
        (the_magnitude_as_it_is_stored, "dora_tensor_parallel"),
        (the_magnitude_the_other_way, "dora_tensor_parallel"),
        (the_chunks_exchanged, "lora_tensor_parallel"),
        (the_chunks_exchanged, "lora_pipeline exported"),
        (up_for_gate, "canonical"),
        (the_layers_backwards, "lora_pipeline"),
        (queries_of_all_groups_first, "lora"),
        (key_for_value, "lora_tensor_parallel exported"),
    ],
)


@pytest.mark.parametrize("case", CASES)
def test_a_golden_is_claimed_by_megatron_alone(case):
    testing.check_claimed_alone(layout, HERE / case / "checkpoint")


def test_names_are_those_of_the_modules_layer_by_layer():
    adapter = lf.load(HERE / "lora_pipeline/checkpoint")
    assert adapter.names == NAMES
    fc2 = "decoder.layers.{}.mlp.linear_fc2.weight"
    assert set(adapter) == {name.format(i) for name in (QKV, fc2) for i in range(3)}
    assert adapter[QKV.format(0)].placement.shape == (48, 36)


def test_a_part_has_the_name_that_its_target_has():
    names = set(lf.load(HERE / "canonical/checkpoint"))
    parts = ("self_attention.linear_q", "self_attention.linear_v", "mlp.linear_fc1_gate", "mlp.linear_fc1_up")
    assert {f"decoder.layers.2.{part}.weight" for part in parts} <= names
    assert not [name for name in names if name.endswith(("linear_qkv.weight", "linear_fc1.weight"))]


def scratch(folder, case="lora", config=None):
    """A copy of a checkpoint, with another run_config.yaml or with none."""
    shutil.copytree(HERE / case / "checkpoint", folder, dirs_exist_ok=True)
    path = folder / "run_config.yaml"
    text = path.read_text()
    path.unlink()
    if config is not None:
        path.write_text(config(text))
    return folder


def test_without_its_configuration_alpha_is_asked_for(tmp_path):
    folder = scratch(tmp_path)
    found = problems_of(lf.load, folder)
    assert {p.rule for p in found} == {"LF-509"}
    assert "--alpha" in found[0].fix
    adapter = layout.read(open_source(folder), ReadOptions(alpha=8)).adapter
    assert {update.scale for update in adapter.values()} == {8 / 5}


def test_an_alpha_that_contradicts_the_configuration_is_refused():
    found = problems_of(layout.read, open_source(HERE / "lora/checkpoint"), ReadOptions(alpha=16))
    assert {p.rule for p in found} == {"LF-507"}


CONFIGS = {
    "another method": ("peft.lora.LoRA", "peft.multi_lora.MultiLoRA", "LF-504"),
    "a rank that the tensors have not": ("  dim: 5\n", "  dim: 6\n", "LF-507"),
    "no alpha": ("  alpha: 8\n", "", "LF-503"),
    "an alpha that is a word": ("  alpha: 8\n", "  alpha: none\n", "LF-503"),
    "no rank": ("  dim: 5\n", "  dim: 0\n", "LF-503"),
    "an alpha that no float holds": ("  alpha: 8\n", f"  alpha: {10**400}\n", "LF-503"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(name, tmp_path):
    old, new, rule = CONFIGS[name]
    found = problems_of(lf.load, scratch(tmp_path, config=lambda text: text.replace(old, new)))
    assert {p.rule for p in found} == {rule}


def test_no_alpha_is_a_scale_of_one(tmp_path):
    """Megatron-Bridge 0.6.2 peft/utils.py: alpha is dim where it is None."""
    folder = scratch(tmp_path, config=lambda text: text.replace("  alpha: 8\n", "  alpha: null\n"))
    assert {update.scale for update in lf.load(folder).values()} == {1.0}


def test_the_rank_of_experts_may_be_another():
    told = "peft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  alpha: 8.0\n  dim: 6\n  normalize_moe_lora: {}\n"
    assert method_of(told.format("true")).expert_dim is None
    assert method_of(told.format("false")).expert_dim == 6


@pytest.mark.parametrize("text", [None, "", "peft: null\n", "model:\n  dim: 3\n"])
def test_a_configuration_without_adapters_says_nothing(text):
    assert method_of(text) is None


def test_heads_are_those_of_the_run_and_of_the_model():
    text = (HERE / "lora/checkpoint/run_config.yaml").read_text()
    assert heads_of_run(text) == heads_of_model(config_of("lora")) == Heads(groups=3, queries=2, size=4)
    assert heads_of_run(text.replace("num_query_groups: 3", "num_query_groups: null")) == Heads(6, 1, 4)
    assert heads_of_run(None) is None
    assert heads_of_model({"num_attention_heads": 4, "hidden_size": 20}) == Heads(groups=4, queries=1, size=5)
    for wrong in ({}, {"num_attention_heads": 4}, {"num_attention_heads": 10**9, "hidden_size": 10**9}):
        assert heads_of_model(wrong) is None
    assert heads_of_model({"num_attention_heads": 4, "num_key_value_heads": 3, "head_dim": 2}) is None


def test_heads_of_another_model_are_refused_and_without_the_run_they_are_the_models(tmp_path):
    adapter = lf.load(HERE / "lora/checkpoint")
    (first, *_) = problems_of(retarget, adapter, "torch", config=config_of("lora") | {"num_key_value_heads": 6})
    assert (first.rule, "3 groups of 2 queries of 4" in first.what) == ("LF-606", True)
    bare = layout.read(open_source(scratch(tmp_path)), ReadOptions(alpha=8)).adapter
    assert lf.digest(retarget(bare, "torch", config=config_of("lora")).adapter) == lf.digest(in_torch("lora"))
    assert {p.rule for p in problems_of(retarget, bare, "torch", config={"model_type": "llama"})} == {"LF-604"}


def test_a_model_whose_names_are_not_known_takes_names():
    adapter = lf.load(HERE / "lora/checkpoint")
    for config in ({}, {"model_type": "gpt2"}):
        assert {p.rule for p in problems_of(retarget, adapter, "torch", config=config)} == {"LF-604"}


@pytest.mark.parametrize("case", EXPORTED)
def test_back_in_megatrons_names_every_part_is_in_its_module(case):
    adapter = lf.load(HERE / case / "checkpoint")
    again = retarget(in_torch(case), NAMES, config=config_of(case)).adapter
    assert again.keys() == adapter.keys()
    testing.check_golden(again, {key: update.matrix() for key, update in adapter.items()})


def test_a_magnitude_that_every_rank_had_another_of_is_refused(monkeypatch):
    real = Distributed.cuts
    monkeypatch.setattr(
        Distributed, "cuts", lambda self, name, axis: 3 if "linear_proj" in name else real(self, name, axis)
    )
    (problem,) = problems_of(lf.load, HERE / "dora/checkpoint")
    assert (problem.rule, "linear_proj.adapter.weight_magnitude" in problem.where) == ("LF-504", True)


def test_a_checkpoint_is_not_written(tmp_path):
    found = problems_of(save, lf.load(HERE / "lora/checkpoint"), tmp_path / "out", layout)
    assert {p.rule for p in found} == {"LF-508"}


def test_tensors_in_memory_are_no_checkpoint():
    name = "decoder.layers.0.mlp.router.adapter.linear_in.weight"
    assert {p.rule for p in problems_of(lf.from_tensors, {name: np.ones((2, 3))}, "megatron")} == {"LF-501"}


def rewritten(folder, *changes):
    shutil.copytree(HERE / "lora/checkpoint", folder, dirs_exist_ok=True)
    data = (folder / ".metadata").read_bytes()
    for old, new in changes:
        assert len(old) == len(new)
        assert old in data
        data = data.replace(old, new)
    (folder / ".metadata").write_bytes(data)
    return folder


def test_what_else_was_trained_is_refused_by_its_name(tmp_path):
    folder = rewritten(tmp_path, (b"linear_fc2.adapter.linear_in.weight", b"linear_fc2.vision_.linear_up.weight"))
    found = problems_of(lf.load, folder)
    assert {p.rule for p in found} == {"LF-506", "LF-303"}
    assert any("linear_fc2.vision_.linear_up" in p.where for p in found)


def test_one_pair_for_nobody_knows_how_many_experts_is_refused(tmp_path):
    old, new = b"self_attention.linear_proj.", b"mlp.experts.exp.linear_fc2."
    found = problems_of(lf.load, rewritten(tmp_path, (old, new)))
    assert {(p.rule, "experts" in p.where) for p in found} == {("LF-309", True)}


def test_the_state_of_the_optimizer_is_no_part_of_an_adapter(tmp_path):
    old, new = b"decoder.layers.mlp.linear_fc2.", b"optimizer.s.exp_a.linear_fc2."
    adapter = lf.load(rewritten(tmp_path, (old, new + b"x" * (len(old) - len(new)))))
    assert len(adapter) == 9


def test_it_is_converted_to_peft_as_the_bridge_itself_exports_it(tmp_path, run):
    shutil.copytree(HERE / "lora/checkpoint", tmp_path / "iter_0000100")
    shutil.copy(HERE / "base/config.json", tmp_path)
    told = run("convert", "iter_0000100", "out", "--to", "peft", "--base", "config.json")
    assert told.code == 0, told.err
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", HERE / "lora/peft"))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], tensor) for name, tensor in wanted.items())
    ours, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path / "out", HERE / "lora/peft"))
    assert (ours["r"], ours["lora_alpha"]) == (theirs["r"], theirs["lora_alpha"])
