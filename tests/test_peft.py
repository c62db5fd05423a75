"""PEFT adapters: what PEFT wrote is read as PEFT means it, and what we write PEFT loads."""

import json
import shutil

import numpy as np
import pytest
from peft_goldens import (
    HERE,
    NOT_WRITTEN,
    OTHER_SCALES,
    SUPPORTED,
    WRITTEN_AS_LORA,
    adapter_of,
    base_of,
    check_deltas,
    check_merge,
    check_numbers,
    check_round_trip,
    hints_of,
    loaded,
    placed,
    raw,
    truth_of,
)
from refused import problems_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.verbs.convert import save
from loraformat_converters.peft import config as configs

# Case → the rule that refuses it and words that name the reason.
REFUSED = {
    "grouped_conv": ("LF-504", "a grouped convolution"),
    "ia3": ("LF-504", "peft_type IA3 multiplies the base weight"),
    "oft": ("LF-504", "peft_type OFT multiplies the base weight"),
    "pissa": ("LF-504", "init_lora_weights='pissa' moves the base weights"),
}
# Every method of PEFT → words of the reason; None where it is read.
METHODS = {
    **dict.fromkeys(("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "TRAINABLE_TOKENS")),
    **dict.fromkeys(
        ("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"), "no weight of the base changes"
    ),
    **dict.fromkeys(("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW"), "no weight of the base changes"),
    **dict.fromkeys(("BOFT", "GLORA", "HIRA", "HRA", "IA3", "OFT", "ROAD"), "multiplies the base weight"),
    **dict.fromkeys(("DEFT", "FROD", "OSF", "PEANUT", "PSOFT"), "makes ΔW from the base weight itself"),
    **dict.fromkeys(("ADAMSS", "C3A", "DELORA", "FOURIERFT", "GRALORA", "MISS"), "in another way than by factors"),
    **dict.fromkeys(("RANDLORA", "SHIRA", "SUPERTUNING", "TINYLORA"), "in another way than by factors"),
    **dict.fromkeys(("UNILORA", "VBLORA", "WAVEFT"), "in another way than by factors"),
    **dict.fromkeys(("LILY", "POLY", "XLORA"), "decides by the input what is added"),
    "PVERA": "a mean and a spread",
    "BEFT": "one more bias",
    "LN_TUNING": "whole normalisation layers",
}

every = pytest.mark.parametrize("case", SUPPORTED)


def test_the_goldens_are_all_here_and_each_is_either_supported_or_refused():
    expected = {*SUPPORTED, *REFUSED, "patterns_resorted"}
    assert {path.parent.name for path in HERE.glob("*/golden.json")} == expected


# What PEFT wrote.


@every
def test_a_golden_changes_the_parameters_that_peft_changes_by_the_delta_that_peft_computed(case):
    check_deltas(case)


@pytest.mark.parametrize("case", [case for case in SUPPORTED if case not in OTHER_SCALES])
def test_a_golden_has_the_ranks_and_scales_that_the_peft_layers_hold(case):
    check_numbers(case)


@every
def test_a_golden_merged_into_its_base_is_what_peft_merges(case, tmp_path):
    check_merge(case, tmp_path)


@every
def test_a_merged_golden_is_accepted_by_verify(case, tmp_path):
    merged = lf.open_base(check_merge(case, tmp_path))
    verdict = lf.verify(lf.open_base(base_of(case)), loaded(case), merged, hints_of(case))
    assert verdict.problems == []
    assert verdict.touched.keys() == truth_of(case, "merged").keys()


@pytest.mark.parametrize("case", [case for case in SUPPORTED if case not in (*WRITTEN_AS_LORA, *NOT_WRITTEN)])
def test_a_golden_through_the_native_file_comes_back_with_equal_bytes_and_an_equal_configuration(case, tmp_path):
    check_round_trip(case, tmp_path)


@every
def test_a_golden_reads_without_a_warning_unless_patterns_overlap(case):
    options = registry.ReadOptions(base=lf.open_base(base_of(case)))
    warnings = registry.read(adapter_of(case), options=options)[0].warnings
    assert {w.rule for w in warnings} == ({"LF-507"} if case == "patterns" else set())


@pytest.mark.parametrize("case", WRITTEN_AS_LORA)
def test_what_is_exactly_a_lora_goes_back_to_peft_as_one(case, tmp_path):
    adapter = loaded(case)
    save(adapter, tmp_path / "peft", registry.layout("peft"))
    again = lf.load(tmp_path / "peft")
    assert again.keys() == adapter.keys()
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for key, update in adapter.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-6


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_several_parameters_of_one_module_are_not_written_in_an_order_that_nobody_knows(case, tmp_path):
    problems = problems_of(save, loaded(case), tmp_path / "peft", registry.layout("peft"))
    assert {p.rule for p in problems} == {"LF-508"}
    assert "in the order of their definition" in problems[0].what


@pytest.mark.parametrize("case", ["target_parameters", "target_parameters_transposed", "vera"])
def test_what_only_the_shapes_of_the_base_tell_is_refused_without_it(case):
    problems = problems_of(lf.load, adapter_of(case))
    assert {p.rule for p in problems} == {"LF-504"}
    assert all("give the base" in p.fix for p in problems)


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_of_peft_is_read_or_refused_by_its_reason(kind):
    text = json.dumps(json.loads((HERE / "types.json").read_text())["configs"][kind])
    if METHODS[kind] is None:
        assert configs.parse(text)[1] == []
        return
    (problem,) = problems_of(configs.parse, text)
    assert problem.rule == "LF-504"
    assert problem.what.startswith(f"peft_type {kind} ")
    assert METHODS[kind] in problem.what


def test_the_table_of_methods_is_that_of_peft():
    assert json.loads((HERE / "types.json").read_text())["configs"].keys() == METHODS.keys()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_a_reason_that_names_it(case):
    rule, words = REFUSED[case]
    problems = problems_of(lf.load, adapter_of(case))
    assert {p.rule for p in problems} == {rule}
    assert words in problems[0].what


def test_patterns_that_peft_sorted_are_read_as_peft_reloads_them_with_a_warning():
    check_deltas("patterns_resorted", "truth_reloaded")
    check_numbers("patterns_resorted", "targets_reloaded")
    (warning,) = registry.read(adapter_of("patterns_resorted"))[0].warnings
    assert (warning.rule, warning.severity) == ("LF-507", "warning")
    assert warning.where == "model.layers.1.self_attn.q_proj"
    assert "4 and 11" in warning.what


# Orientation.


CHOSEN = [
    (["v_proj"], True),
    (r".*\.v_proj", True),
    (["x", "q_proj"], False),
    (r".*(q|v)_proj", False),
    ("all-linear", False),
]


@pytest.mark.parametrize(("chosen", "told"), [*CHOSEN, (None, False), ("(", False)])
def test_factors_that_pefts_configuration_does_not_choose_are_told(chosen, told, tmp_path):
    """peft 0.21.2 makes no module for them, and loads the rest: the base computes, without a word about them."""
    factors = {"lora_A": np.ones((2, 5), np.float32), "lora_B": np.ones((7, 2), np.float32)}
    save_file(
        {f"base_model.model.m.q_proj.{n}.weight": t for n, t in factors.items()}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": chosen}
    (tmp_path / configs.FILE).write_text(json.dumps(config))
    (reading, *_) = registry.read(tmp_path)
    assert [(w.rule, w.severity, w.where) for w in reading.warnings] == [("LF-507", "warning", "m.q_proj")] * told


@pytest.mark.peer
def test_peft_loads_an_adapter_without_what_its_configuration_does_not_choose(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    def two():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))

    trained = peft.get_peft_model(two(), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / configs.FILE).read_text())
    (tmp_path / configs.FILE).write_text(json.dumps({**config, "target_modules": ["1"], "init_lora_weights": True}))
    x = torch.ones(3, 5)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.PeftModel.from_pretrained(two(), str(tmp_path))
    assert torch.equal(loaded(x), two()(x))
    assert not torch.allclose(trained(x), two()(x))
    assert [(w.rule, w.where) for w in registry.read(tmp_path)[0].warnings] == [("LF-507", "0")]


def test_a_linear_or_a_conv1d_is_unplaced_because_the_files_of_both_look_the_same():
    assert {u.placement for u in lf.load(adapter_of("gpt2")).values()} == {None}
    assert {u.placement for u in lf.load(adapter_of("llama")).values()} == {None}


def test_an_unplaced_square_weight_has_no_delta():
    update = lf.load(adapter_of("gpt2"))["transformer.h.0.attn.c_proj.weight"]
    assert [p.rule for p in problems_of(update.delta)] == ["LF-604"]


def test_the_configuration_of_gpt2_says_that_its_square_conv1d_is_transposed():
    found = placed("gpt2")["transformer.h.0.attn.c_proj.weight"]
    assert found.placement == lf.Placement((24, 24), out=(1,), in_=(0,))
    assert (
        testing.relative_error(found.delta(), truth_of("gpt2", "delta")["transformer.h.0.attn.c_proj.weight"]) <= 1e-6
    )


def test_the_configuration_of_llama_says_that_its_square_linear_is_not_transposed():
    key = "model.layers.1.self_attn.q_proj.weight"
    found = placed("llama")[key]
    assert found.placement == lf.Placement((24, 24), out=(0,), in_=(1,))
    assert testing.relative_error(found.delta(), truth_of("llama", "delta")[key]) <= 1e-6


def test_a_square_weight_without_a_configuration_is_refused():
    base = lf.open_base(base_of("linear_square"))
    resolution = base.resolve(lf.load(adapter_of("linear_square")), lf.Hints())
    assert resolution.targets == {}
    assert [p.rule for p in resolution.unresolved] == ["LF-604"] * 4
    assert "--axes" in resolution.unresolved[0].fix


def test_the_same_checkpoint_without_its_configuration_is_no_evidence_for_a_square_weight(tmp_path):
    shutil.copy(base_of("gpt2") / "model.safetensors", tmp_path)
    resolution = lf.open_base(tmp_path).resolve(lf.load(adapter_of("gpt2")), lf.Hints())
    assert {p.where for p in resolution.unresolved} == {f"transformer.h.{i}.attn.c_proj.weight" for i in (0, 1)}


def test_the_users_word_places_what_nothing_else_does():
    base = lf.open_base(base_of("linear_square"))
    bound = lf.bind(lf.load(adapter_of("linear_square")), base, lf.Hints(axes={"*": "in,out"}))
    wanted = truth_of("linear_square", "delta")
    assert all(testing.relative_error(u.delta(), wanted[k].T) <= 1e-6 for k, u in bound.items())


def test_the_users_word_against_the_configuration_is_refused():
    base = lf.open_base(base_of("gpt2"))
    problems = problems_of(lf.bind, lf.load(adapter_of("gpt2")), base, lf.Hints(axes={"attn.c_proj": "out,in"}))
    assert {p.rule for p in problems} == {"LF-605"}
    assert "user" in problems[0].what
    assert "Conv1D" in problems[0].what


def test_the_users_word_against_the_shape_is_refused():
    base = lf.open_base(base_of("linear"))
    problems = problems_of(lf.bind, lf.load(adapter_of("linear")), base, lf.Hints(axes={"mlp.fc": "in,out"}))
    assert {p.rule for p in problems} == {"LF-605"}


def test_a_bound_adapter_keeps_its_digest_and_its_round_trip(tmp_path):
    adapter, bound = lf.load(adapter_of("gpt2")), placed("gpt2")
    assert lf.digest(adapter) == lf.digest(bound)
    lf.save(bound, tmp_path / "bound.safetensors")
    lf.convert(tmp_path / "bound.safetensors", tmp_path / "peft")
    assert raw(tmp_path / "peft" / "adapter_model.safetensors") == raw(adapter_of("gpt2") / "adapter_model.safetensors")


# What was done wrong with a merge.

WRONG = {
    "not applied": ("linear", lambda w, d: w, "was not applied"),
    "applied twice": ("linear", lambda w, d: w + 2 * d, "applied twice"),
    "transposed": ("linear_square", lambda w, d: w + d.T, "transposed"),
    "scale lost": ("linear", lambda w, d: w + d / 1.5, "scale was lost"),
    "alpha as scale": ("linear", lambda w, d: w + d / 1.5 * 9, "alpha was taken for the scale"),
    "rsLoRA ignored": ("rslora", lambda w, d: w + d / np.sqrt(5), "rsLoRA was ignored"),
}


def test_verify_names_no_mistake_that_explains_only_most_of_it(tmp_path):
    tensors, deltas = load_file(base_of("rslora")), truth_of("rslora", "delta")
    near = {k: (tensors[k] + d / np.sqrt(5) * 0.9).astype(np.float32) for k, d in deltas.items()}
    save_file(tensors | near, tmp_path / "m.safetensors")
    merged = lf.open_base(tmp_path / "m.safetensors")
    verdict = lf.verify(lf.open_base(base_of("rslora")), lf.load(adapter_of("rslora")), merged)
    assert verdict.touched.keys() == {p.where for p in verdict.problems}
    assert not any("rsLoRA" in p.what for p in verdict.problems)


@pytest.mark.parametrize("mistake", WRONG)
def test_verify_names_the_mistake_of_a_wrong_merge(mistake, tmp_path):
    case, wrong, words = WRONG[mistake]
    tensors, deltas = load_file(base_of(case)), truth_of(case, "delta")
    save_file(
        tensors | {k: wrong(tensors[k], d).astype(np.float32) for k, d in deltas.items()}, tmp_path / "m.safetensors"
    )
    merged = lf.open_base(tmp_path / "m.safetensors")
    verdict = lf.verify(lf.open_base(base_of(case)), lf.load(adapter_of(case)), merged, hints_of(case))
    assert {p.rule for p in verdict.problems} == {"LF-611"}
    assert {p.where for p in verdict.problems} == deltas.keys()
    assert all(words in p.what for p in verdict.problems)


def test_verify_sees_one_value_of_a_tensor_that_is_no_target(tmp_path):
    merged = load_file(check_merge("linear", tmp_path))
    merged["head.weight"][3, 4] = np.nextafter(merged["head.weight"][3, 4], np.float32(9))
    save_file(merged, tmp_path / "touched.safetensors")
    base, found = lf.open_base(base_of("linear")), lf.open_base(tmp_path / "touched.safetensors")
    verdict = lf.verify(base, lf.load(adapter_of("linear")), found)
    assert [(p.rule, p.where) for p in verdict.problems] == [("LF-611", "head.weight")]


def test_verify_sees_one_value_of_a_target(tmp_path):
    merged = load_file(check_merge("linear", tmp_path))
    merged["blocks.0.mlp.fc.weight"][3, 4] *= 1.001
    save_file(merged, tmp_path / "touched.safetensors")
    base, found = lf.open_base(base_of("linear")), lf.open_base(tmp_path / "touched.safetensors")
    verdict = lf.verify(base, lf.load(adapter_of("linear")), found)
    assert [(p.rule, p.where) for p in verdict.problems] == [("LF-611", "blocks.0.mlp.fc.weight")]
