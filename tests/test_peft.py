"""PEFT adapters: what PEFT wrote is read as PEFT means it, and what we write PEFT loads."""

import json
import shutil

import numpy as np
import pytest
from peft_goldens import (
    HERE,
    SUPPORTED,
    adapter_of,
    base_of,
    check_deltas,
    check_merge,
    check_numbers,
    check_patterns,
    check_round_trip,
    facts_of,
    hints_of,
    placed,
    raw,
    truth_of,
)
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.identity import digest
from loraformat.verbs.bind import bind
from loraformat.verbs.convert import convert, save
from loraformat.verbs.verify import verify
from loraformat_converters.peft import config as configs

# Case → the rule that refuses it and words that name the reason.
REFUSED = {
    "adalora": ("LF-504", "peft_type ADALORA is not read yet"),
    "bias_all": ("LF-504", "trained biases (bias='all')"),
    "bias_lora_only": ("LF-504", "trained biases (bias='lora_only')"),
    "bin": ("LF-701", "adapter_model.bin is a pickle"),
    "dora": ("LF-504", "DoRA is not read yet"),
    "embedding_saved": ("LF-504", "a base weight saved beside its factors (save_embedding_layers)"),
    "grouped_conv": ("LF-504", "a grouped convolution"),
    "ia3": ("LF-504", "peft_type IA3 multiplies the base weight"),
    "loha": ("LF-504", "peft_type LOHA is not read yet"),
    "lokr": ("LF-504", "peft_type LOKR is not read yet"),
    "lora_bias": ("LF-504", "lora_bias adds a trained bias"),
    "modules_to_save": ("LF-504", "modules_to_save=['head']"),
    "multihead_attention": ("LF-504", "nn.MultiheadAttention"),
    "oft": ("LF-504", "peft_type OFT multiplies the base weight"),
    "pissa": ("LF-504", "init_lora_weights='pissa' moves the base weights"),
    "seq_cls": ("LF-504", "modules_to_save=['classifier', 'score']"),
    "target_parameters": ("LF-504", "target_parameters (expert weights)"),
    "target_parameters_transposed": ("LF-504", "target_parameters (expert weights)"),
    "trainable_tokens": ("LF-504", "trained token rows"),
    "trainable_tokens_tied": ("LF-504", "trained token rows"),
    "vera": ("LF-504", "peft_type VERA is not read yet"),
}

every = pytest.mark.parametrize("case", SUPPORTED)


def problems_of(call, *args, **kwargs):
    with pytest.raises(lf.LoraFormatError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def edited(case, folder, **changes):
    """A copy of a golden adapter with other values in its configuration."""
    shutil.copytree(adapter_of(case), folder)
    config = json.loads((folder / configs.FILE).read_text())
    (folder / configs.FILE).write_text(json.dumps(config | changes))
    return folder


def test_the_goldens_are_all_here_and_each_is_either_supported_or_refused():
    expected = {*SUPPORTED, *REFUSED, "patterns_resorted"}
    assert {path.parent.name for path in HERE.glob("*/golden.json")} == expected


# What PEFT wrote.


@every
def test_a_golden_changes_the_parameters_that_peft_changes_by_the_delta_that_peft_computed(case):
    check_deltas(case)


@every
def test_a_golden_has_the_ranks_and_scales_that_the_peft_layers_hold(case):
    check_numbers(case)


@every
def test_a_golden_merged_into_its_base_is_what_peft_merges(case, tmp_path):
    check_merge(case, tmp_path)


@every
def test_a_merged_golden_is_accepted_by_verify(case, tmp_path):
    merged = lf.open_base(check_merge(case, tmp_path))
    verdict = verify(lf.open_base(base_of(case)), lf.load(adapter_of(case)), merged, hints_of(case))
    assert verdict.problems == []
    assert verdict.touched.keys() == facts_of(case)["targets"].keys()


@every
def test_a_golden_through_the_native_file_comes_back_with_equal_bytes_and_an_equal_configuration(case, tmp_path):
    check_round_trip(case, tmp_path)


@every
def test_a_golden_reads_without_a_warning_unless_patterns_overlap(case):
    warnings = registry.read(adapter_of(case))[0].warnings
    assert {w.rule for w in warnings} == ({"LF-507"} if case == "patterns" else set())


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
    bound = bind(lf.load(adapter_of("linear_square")), base, lf.Hints(axes={"*": "in,out"}))
    wanted = truth_of("linear_square", "delta")
    assert all(testing.relative_error(u.delta(), wanted[k].T) <= 1e-6 for k, u in bound.items())


def test_the_users_word_against_the_configuration_is_refused():
    base = lf.open_base(base_of("gpt2"))
    problems = problems_of(bind, lf.load(adapter_of("gpt2")), base, lf.Hints(axes={"attn.c_proj": "out,in"}))
    assert {p.rule for p in problems} == {"LF-605"}
    assert "user" in problems[0].what
    assert "Conv1D" in problems[0].what


def test_the_users_word_against_the_shape_is_refused():
    base = lf.open_base(base_of("linear"))
    problems = problems_of(bind, lf.load(adapter_of("linear")), base, lf.Hints(axes={"mlp.fc": "in,out"}))
    assert {p.rule for p in problems} == {"LF-605"}


def test_a_bound_adapter_keeps_its_digest_and_its_round_trip(tmp_path):
    adapter, bound = lf.load(adapter_of("gpt2")), placed("gpt2")
    assert digest(adapter) == digest(bound)
    lf.save(bound, tmp_path / "bound.safetensors")
    convert(tmp_path / "bound.safetensors", tmp_path / "peft")
    assert raw(tmp_path / "peft" / "adapter_model.safetensors") == raw(adapter_of("gpt2") / "adapter_model.safetensors")


# Configurations.


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"r": 8}, "LF-507", "the rank is stated as 8, and is 6"),
        ({"r": "6"}, "LF-503", "r must be a positive integer, not '6'"),
        ({"r": True}, "LF-503", "r must be a positive integer, not True"),
        ({"lora_alpha": None}, "LF-509", "the scale is unknown"),
        ({"lora_alpha": "9"}, "LF-503", "lora_alpha must be a finite number, not '9'"),
        ({"lora_alpha": 10**200}, "LF-503", "beyond 2^53"),
        ({"use_rslora": "yes"}, "LF-503", "use_rslora must be true or false"),
        ({"rank_pattern": [4]}, "LF-503", "rank_pattern must be an object"),
        ({"rank_pattern": {"fc(": 4}}, "LF-503", "no regular expression to use"),
        ({"alpha_pattern": {r"(\w)\1": 4}}, "LF-503", "groupref cannot be matched in bounded time"),
        ({"alpha_pattern": {"fc": "4"}}, "LF-503", "alpha_pattern['fc'] must be a finite number"),
        ({"peft_type": "LN_TUNING"}, "LF-504", "peft_type LN_TUNING is another method than LoRA"),
        ({"peft_type": "PREFIX_TUNING"}, "LF-504", "no weight of the base changes"),
        ({"peft_type": None}, "LF-504", "peft_type None says nothing"),
        ({"init_lora_weights": "pissa_niter_4"}, "LF-504", "moves the base weights"),
        ({"init_lora_weights": "fancy"}, "LF-504", "is not known to keep the base"),
        ({"alora_invocation_tokens": [1, 2]}, "LF-504", "aLoRA acts only after certain tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "LF-504", "layer_replication changes the base's layers"),
        ({"use_bdlora": {"target_modules_bd_a": ["fc"]}}, "LF-504", "block-diagonal factors are not read yet"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_configuration_that_means_something_else_is_refused_by_its_reason(changes, rule, words, tmp_path):
    problems = problems_of(lf.load, edited("linear", tmp_path / "adapter", **changes))
    assert {p.rule for p in problems} == {rule}
    assert words in problems[0].what


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "LORA", "r": 1e999}', '{"r": 1, "r": 2}'])
def test_a_configuration_that_is_not_strict_json_is_refused(text, tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    (folder / configs.FILE).write_text(text)
    assert {p.rule for p in problems_of(registry.read, folder, "peft")} == {"LF-503"}


def test_a_pattern_means_the_end_of_a_path_from_a_dot_on():
    check_patterns(configs._meant)


def test_an_unknown_key_with_a_value_warns_and_names_the_nearest(tmp_path):
    folder = edited("linear", tmp_path / "adapter", use_rslorra=True, unheard_of=None)
    (warning,) = registry.read(folder)[0].warnings
    assert (warning.rule, warning.severity) == ("LF-505", "warning")
    assert "did you mean 'use_rslora'" in warning.what


def test_without_a_configuration_the_scale_is_unknown_until_the_user_states_it(tmp_path):
    file = shutil.copy(adapter_of("linear") / "adapter_model.safetensors", tmp_path)
    assert {p.rule for p in problems_of(lf.load, file)} == {"LF-509"}
    options = registry.ReadOptions(alpha=9, scale_rule="alpha/r")
    stated = registry.read(file, options=options)[0].adapter
    assert digest(stated) == digest(lf.load(adapter_of("linear")))


def test_the_users_word_against_the_configuration_of_the_adapter_is_refused():
    problems = problems_of(registry.read, adapter_of("linear"), options=registry.ReadOptions(alpha=10))
    assert {p.rule for p in problems} == {"LF-507"}
    assert "10" in problems[0].what
    assert "9" in problems[0].what


# Tensors.


@pytest.mark.parametrize(
    ("name", "shape", "rule", "words"),
    [
        ("a.lora_A.weight", (2, 5), "LF-303", "lora_B is missing"),
        ("head.weight", (2, 5), "LF-506", "a fully trained tensor"),
        ("a.lora_magnitude_vector", (5,), "LF-504", "a DoRA magnitude"),
        ("a.lora_A.default.weight", (2, 5), "LF-504", "its adapter's name in the key"),
        ("a.base_layer.bias", (5,), "LF-504", "a trained bias"),
        ("a.base_layer.lora_A.weight", (2, 5), "LF-504", "an expert parameter (target_parameters)"),
    ],
)
def test_a_tensor_that_is_no_factor_is_refused_by_what_it_is(name, shape, rule, words, tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": np.ones(shape, np.float32)}, file)
    (problem,) = problems_of(lf.load, folder)
    assert problem.rule == rule
    assert words in problem.what
    assert name.partition(".")[0] in problem.where


@pytest.mark.parametrize(
    ("shapes", "rule"),
    [
        (((6, 0), (28, 6)), "LF-311"),
        (((6, 0, 3, 3), (28, 6, 1, 1)), "LF-311"),
        (((6,), (28, 6)), "LF-309"),
        (((6, 20), (28, 5)), "LF-309"),
        (((6, 20, 3), (28, 6)), "LF-309"),
        (((6, 20, 3), (28, 6, 2)), "LF-309"),
    ],
)
def test_factors_that_do_not_fit_are_refused_by_their_shapes(shapes, rule, tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    pair = {f"m.lora_{role}.weight": np.ones(shape, np.float32) for role, shape in zip("AB", shapes, strict=True)}
    save_file(pair, folder / "adapter_model.safetensors")
    assert {p.rule for p in problems_of(lf.load, folder)} == {rule}


def test_a_module_cannot_be_a_linear_and_an_embedding_at_once(tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    names = ("m.lora_A.weight", "m.lora_embedding_A", "m.lora_B.weight", "m.lora_embedding_B")
    tensors = {name: np.ones((6, 7) if "_A" in name else (8, 6), np.float32) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors")
    (problem,) = problems_of(lf.load, folder)
    assert problem.rule == "LF-506"
    assert "which is it?" in problem.what


def test_a_key_with_a_control_character_is_refused(tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    pair = {
        "m\x1b[2J.lora_A.weight": np.ones((6, 7), np.float32),
        "m\x1b[2J.lora_B.weight": np.ones((8, 6), np.float32),
    }
    save_file(pair, folder / "adapter_model.safetensors")
    (problem,) = problems_of(lf.load, folder)
    assert problem.rule == "LF-301"
    assert "\x1b" not in str(problem)


def test_factors_of_a_model_that_adapters_were_injected_into_have_no_prefix(tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): t for name, t in load_file(file).items()}, file)
    assert digest(lf.load(folder)) == digest(lf.load(adapter_of("linear")))


# Writing from the model alone.


def scratch(**updates):
    return lf.Adapter({key.replace("__", ".") + ".weight": lf.Update((lora,)) for key, lora in updates.items()})


def lora(rank, in_, out, alpha, rule, seed=0):
    draw = np.random.default_rng(seed)
    a, b = draw.standard_normal((rank, in_)), draw.standard_normal((out, rank))
    return lf.Lora((0.4 * a).astype(np.float32), (0.4 * b).astype(np.float32), alpha, rule)


def rewritten(adapter, tmp_path):
    save(adapter, tmp_path / "peft", registry.layout("peft"))
    return lf.load(tmp_path / "peft"), json.loads((tmp_path / "peft" / configs.FILE).read_text())


def test_mixed_ranks_rules_and_names_are_written_so_that_the_same_numbers_are_read(tmp_path):
    adapter = scratch(
        proj=lora(3, 7, 5, 4.0, "alpha/r", 1),
        a__proj=lora(2, 7, 5, 3.0, "alpha/sqrt(r)", 2),
        layers__1__q=lora(3, 6, 4, 0.3, "factor", 3),
        layers__11__q=lora(4, 6, 4, -2.5, "alpha/r", 4),
    )
    again, config = rewritten(adapter, tmp_path)
    assert sorted(again) == sorted(adapter)
    for key, update in adapter.items():
        assert again[key].scale == pytest.approx(update.scale, rel=3e-16)
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-7
    assert config["use_rslora"] is False
    assert config["r"] == 3


def test_rslora_everywhere_is_written_as_rslora(tmp_path):
    adapter = scratch(p=lora(5, 7, 6, 8.0, "alpha/sqrt(r)"), q=lora(3, 7, 6, 8.0, "alpha/sqrt(r)"))
    again, config = rewritten(adapter, tmp_path)
    assert config["use_rslora"] is True
    assert config["lora_alpha"] == 8
    assert digest(again) == digest(adapter)


def test_a_configuration_that_no_longer_holds_is_written_anew_with_its_notes(tmp_path):
    changes = {"base_model_name_or_path": "some/model", "exclude_modules": ["fc"], "init_lora_weights": False}
    adapter = lf.load(edited("linear", tmp_path / "source", layers_to_transform=[0], **changes))
    key = "blocks.0.mlp.fc.weight"
    changed = {**adapter.targets, key: lf.Update((lora(4, 28, 20, 7.0, "alpha/r"),))}
    again, config = rewritten(lf.Adapter(changed, extensions=adapter.extensions), tmp_path)
    assert (again[key].rank, again[key].scale) == (4, 1.75)
    assert config["base_model_name_or_path"] == "some/model"
    assert not {"exclude_modules", "layers_to_transform", "init_lora_weights"} & config.keys()


@pytest.mark.parametrize(
    ("kinds", "words"),
    [(["dora"], "magnitude"), (["experts"], "with a .weight"), (["loha"], "loha"), (["rows"], "rows")],
)
def test_what_peft_cannot_hold_is_refused_before_anything_is_written(kinds, words, tmp_path):
    lf.save(testing.random_adapter(kinds=kinds), tmp_path / "a.safetensors")
    problems = problems_of(convert, tmp_path / "a.safetensors", tmp_path / "peft")
    assert {p.rule for p in problems} == {"LF-508"}
    assert words in problems[0].what
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


def test_a_scale_that_no_alpha_of_float64_gives_is_refused(tmp_path):
    problems = problems_of(rewritten, scratch(p=lora(3, 7, 6, 1e308, "factor")), tmp_path)
    assert [p.rule for p in problems] == ["LF-508"]
    assert not (tmp_path / "peft").exists()


# What was done wrong with a merge.

WRONG = {
    "not applied": ("linear", lambda w, d: w, "was not applied"),
    "applied twice": ("linear", lambda w, d: w + 2 * d, "applied twice"),
    "transposed": ("linear_square", lambda w, d: w + d.T, "transposed"),
    "scale lost": ("linear", lambda w, d: w + d / 1.5, "scale was lost"),
    "alpha as scale": ("linear", lambda w, d: w + d / 1.5 * 9, "alpha was taken for the scale"),
    "rsLoRA ignored": ("rslora", lambda w, d: w + d / np.sqrt(5), "rsLoRA was ignored"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_verify_names_the_mistake_of_a_wrong_merge(mistake, tmp_path):
    case, wrong, words = WRONG[mistake]
    tensors, deltas = load_file(base_of(case)), truth_of(case, "delta")
    save_file(
        tensors | {k: wrong(tensors[k], d).astype(np.float32) for k, d in deltas.items()}, tmp_path / "m.safetensors"
    )
    merged = lf.open_base(tmp_path / "m.safetensors")
    verdict = verify(lf.open_base(base_of(case)), lf.load(adapter_of(case)), merged, hints_of(case))
    assert {p.rule for p in verdict.problems} == {"LF-611"}
    assert {p.where for p in verdict.problems} == deltas.keys()
    assert all(words in p.what for p in verdict.problems)


def test_verify_sees_one_value_of_a_tensor_that_is_no_target(tmp_path):
    merged = load_file(check_merge("linear", tmp_path))
    merged["head.weight"][3, 4] = np.nextafter(merged["head.weight"][3, 4], np.float32(9))
    save_file(merged, tmp_path / "touched.safetensors")
    base, found = lf.open_base(base_of("linear")), lf.open_base(tmp_path / "touched.safetensors")
    verdict = verify(base, lf.load(adapter_of("linear")), found)
    assert [(p.rule, p.where) for p in verdict.problems] == [("LF-611", "head.weight")]


def test_verify_sees_one_value_of_a_target(tmp_path):
    merged = load_file(check_merge("linear", tmp_path))
    merged["blocks.0.mlp.fc.weight"][3, 4] *= 1.001
    save_file(merged, tmp_path / "touched.safetensors")
    base, found = lf.open_base(base_of("linear")), lf.open_base(tmp_path / "touched.safetensors")
    verdict = verify(base, lf.load(adapter_of("linear")), found)
    assert [(p.rule, p.where) for p in verdict.problems] == [("LF-611", "blocks.0.mlp.fc.weight")]
