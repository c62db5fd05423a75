"""What else a PEFT folder can hold, and what is written from the model alone."""

import json
import shutil

import numpy as np
import pytest
from peft_goldens import adapter_of, check_patterns, edited
from refused import problems_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.verbs.convert import save
from loraformat_converters.peft import config as configs

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
        ({"alpha_pattern": {"(fc){e}": 4}}, "LF-503", "a brace that is no repetition"),
        ({"alpha_pattern": {"fc": "4"}}, "LF-503", "alpha_pattern['fc'] must be a finite number"),
        ({"peft_type": "LORAX"}, "LF-504", "peft_type LORAX is no method of peft 0.21.2"),
        ({"peft_type": "PREFIX_TUNING"}, "LF-504", "no weight of the base changes"),
        ({"peft_type": None}, "LF-504", "peft_type None says nothing"),
        ({"init_lora_weights": "pissa_niter_4"}, "LF-504", "moves the base weights"),
        ({"init_lora_weights": "fancy"}, "LF-504", "is not known to keep the base"),
        ({"alora_invocation_tokens": [1, 2]}, "LF-504", "aLoRA acts only after certain tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "LF-504", "layer_replication changes the base's layers"),
        ({"use_bdlora": {"target_modules_bd_a": ["fc"], "nblocks": 0}}, "LF-503", "a positive nblocks"),
        ({"use_bdlora": {"target_modules_bd_a": "fc"}}, "LF-503", "must be lists of names"),
        ({"use_bdlora": {"target_modules_bd_b": 5}}, "LF-503", "must be lists of names"),
        ({"use_bdlora": {"target_modules_bd_a": ["fc"], "nblocks": 4}}, "LF-309", "has no 4 blocks of rows"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["fc"], "target_modules_bd_b": ["mlp"]}},
            "LF-504",
            "means both factors",
        ),
        ({"use_dora": True}, "LF-507", "no magnitude, and use_dora is true"),
        ({"use_dora": True, "lora_bias": True}, "LF-504", "lora_bias with use_dora"),
        ({"bias": "some"}, "LF-504", "bias='some' is none of none, all and lora_only"),
        ({"enable_lora": [True, True, True]}, "LF-504", "only where two parts are enabled"),
        ({"enable_lora": [True, False, True]}, "LF-309", "must be [2r, in] and [2/3 · out, r, 1]"),
        ({"target_parameters": ["mlp.fc.one", "mlp.fc.two"]}, "LF-507", "1 pairs, and target_parameters means"),
        ({"monteclora_config": {"num_samples": 4}}, "LF-504", "the state of a sampler"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_configuration_that_means_something_else_is_refused_by_its_reason(changes, rule, words, tmp_path):
    problems = problems_of(lf.load, edited("linear", tmp_path / "adapter", **changes))
    assert {p.rule for p in problems} == {rule}
    assert words in problems[0].what


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "LORA", "r": 1e999}', '{"r": NaN}'])
def test_a_configuration_that_is_not_strict_json_is_refused(text, tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    (folder / configs.FILE).write_text(text)
    assert {p.rule for p in problems_of(registry.read, folder, "peft")} == {"LF-503"}


def test_a_key_that_stands_twice_with_two_values_is_refused_with_both(tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    text = (folder / configs.FILE).read_text()
    (folder / configs.FILE).write_text(text.replace("{", '{"lora_alpha": 16, ', 1))
    (problem,) = problems_of(lf.load, folder)
    assert (problem.rule, problem.severity) == ("LF-507", "error")
    assert "'lora_alpha' stands twice, with 16 and 9" in problem.what


def test_a_key_that_stands_twice_with_one_value_is_read_with_a_warning(tmp_path):
    folder = edited("linear", tmp_path / "adapter")
    text = (folder / configs.FILE).read_text()
    (folder / configs.FILE).write_text(text.replace("{", '{"lora_alpha": 9, ', 1))
    reading = registry.read(folder)[0]
    assert [(w.rule, w.severity) for w in reading.warnings] == [("LF-507", "warning")]
    assert lf.digest(reading.adapter) == lf.digest(lf.load(adapter_of("linear")))


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
    assert lf.digest(stated) == lf.digest(lf.load(adapter_of("linear")))


def test_the_users_word_against_the_configuration_of_the_adapter_is_refused():
    problems = problems_of(registry.read, adapter_of("linear"), options=registry.ReadOptions(alpha=10))
    assert {p.rule for p in problems} == {"LF-507"}
    assert "10" in problems[0].what
    assert "9" in problems[0].what


# Tensors.


def test_a_bias_that_peft_saves_twice_with_bias_all_is_one(tmp_path):
    """As peft 0.21.2 writes it where a module is saved as a whole too; test_merged_models has PEFT's own file."""
    folder = edited("bias_all", tmp_path / "adapter", modules_to_save=["head"])
    file, plain = folder / "adapter_model.safetensors", lf.load(adapter_of("bias_all"))
    name = "base_model.model.head{}.bias"
    new, old = np.ones(3, np.float32), np.zeros(3, np.float32)
    whole = load_file(file) | {name.format(""): new, name.format(".original_module"): old}
    save_file(whole | {name.format(".modules_to_save.default"): new}, file)
    adapter = lf.load(folder)
    assert adapter.keys() == plain.keys() | {"head.bias"}
    assert np.array_equal(adapter["head.bias"]["replace"].replace, new)
    save_file(whole | {name.format(".modules_to_save.default"): new + 1}, file)
    (problem,) = problems_of(lf.load, folder)
    assert (problem.rule, problem.where) == ("LF-507", name.format(".modules_to_save.default"))


@pytest.mark.parametrize(
    ("name", "shape", "rule", "words"),
    [
        ("a.lora_A.weight", (2, 5), "LF-303", "lora_B is missing"),
        ("head.cls_token", (2, 5), "LF-506", "neither a role of the adapter nor a parameter"),
        ("blocks.0.mlp.fc.lora_magnitude_vector", (20,), "LF-507", "a magnitude, and use_dora is false"),
        ("blocks.0.mlp.fc.lora_B.bias", (20,), "LF-507", "lora_bias is false"),
        ("a.lora_A.default.weight", (2, 5), "LF-504", "its adapter's name in the key"),
        ("a.lora_diag", (5,), "LF-504", "KaSA's diagonal"),
        ("a.modules_to_save.default.weight", (5,), "LF-504", "inside the wrapper of a saved module"),
        ("a.hada_w1_a", (5, 2), "LF-506", "hada_w1_a is no tensor of a LORA adapter"),
        ("a.lora_E", (5, 1), "LF-506", "lora_E is no tensor of a LORA adapter"),
        ("a.base_layer.lora_A.weight", (2, 5), "LF-506", "no target_parameters names them"),
        ("a.token_adapter.trainable_tokens_delta", (2, 5), "LF-507", "does not list their indices"),
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
    assert lf.digest(lf.load(folder)) == lf.digest(lf.load(adapter_of("linear")))


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
    assert lf.digest(again) == lf.digest(adapter)


def test_a_configuration_that_no_longer_holds_is_written_anew_with_its_notes(tmp_path):
    changes = {"base_model_name_or_path": "some/model", "exclude_modules": ["fc"], "init_lora_weights": False}
    adapter = lf.load(edited("linear", tmp_path / "source", layers_to_transform=[0], **changes))
    key = "blocks.0.mlp.fc.weight"
    changed = {**adapter.targets, key: lf.Update((lora(4, 28, 20, 7.0, "alpha/r"),))}
    again, config = rewritten(lf.Adapter(changed, extensions=adapter.extensions), tmp_path)
    assert (again[key].rank, again[key].scale) == (4, 1.75)
    assert config["base_model_name_or_path"] == "some/model"
    assert not {"exclude_modules", "layers_to_transform", "init_lora_weights"} & config.keys()


KINDS = {
    "dora beside a plain LoRA": (["lora", "dora"], "use_dora holds for every module"),
    "loha beside a LoRA": (["lora", "loha"], "one method an adapter"),
    "rows beside loha": (["loha", "rows"], "one method an adapter"),
    "a whole parameter alone": (["replace"], "needs a module that is adapted by factors"),
    "a difference without factors": (["lora", "delta"], "beside the factors of its module's weight"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_peft_cannot_hold_is_refused_before_anything_is_written(name, tmp_path):
    kinds, words = KINDS[name]
    lf.save(testing.random_adapter(kinds=kinds), tmp_path / "a.safetensors")
    problems = problems_of(lf.convert, tmp_path / "a.safetensors", tmp_path / "peft")
    assert {p.rule for p in problems} == {"LF-508"}
    assert any(words in p.what for p in problems), problems
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


def test_a_scale_that_no_alpha_of_float64_gives_is_refused(tmp_path):
    problems = problems_of(rewritten, scratch(p=lora(3, 7, 6, 1e308, "factor")), tmp_path)
    assert [p.rule for p in problems] == ["LF-508"]
    assert not (tmp_path / "peft").exists()
