"""PEFT's rarer kinds: what their files leave open, what is wrong in them, and what is written of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from peft_goldens import adapter_of, base_of, edited, loaded, placed, truth_of
from refused import problems_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.verbs.convert import save
from loraformat_converters.peft import config as configs

PREFIX = "base_model.model."


def changed(case, folder, tensors=(), without=(), **changes):
    """A copy of a golden adapter with other tensors and another configuration."""
    edited(case, folder, **changes)
    file = folder / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not any(word in n for word in without)}
    save_file(kept | {f"{PREFIX}{n}": np.asarray(t) for n, t in dict(tensors).items()}, file)
    return folder


def only_problem(folder, **options):
    (problem,) = problems_of(registry.read, folder, options=registry.ReadOptions(**options))
    return problem


def base_with(folder, **tensors):
    save_file({name.replace("__", "."): t for name, t in tensors.items()}, folder / "base.safetensors")
    return lf.open_base(folder / "base.safetensors")


def written(adapter, folder):
    save(adapter, folder / "out", registry.layout("peft"))
    tensors = load_file(folder / "out" / "adapter_model.safetensors")
    return tensors, json.loads((folder / "out" / configs.FILE).read_text())


def ones(*shape):
    return np.ones(shape, np.float32)


# Faults.

FAULTS = {
    "half of a LoHa": ("loha", {"without": ["fc.hada_w1_b"]}, "LF-303", "hada_w1_b is missing"),
    "LoHa of another rank": ("loha", {"r": 4}, "LF-507", "stated as 4, and is 3"),
    "LoKr without a second factor": ("lokr", {"without": ["fc.lokr_w2_a", "fc.lokr_w2_b"]}, "LF-309", "give either"),
    "a whole LoKr without a rank": ("lokr_whole", {"r": None, "rank_pattern": {}}, "LF-509", "the scale is unknown"),
    "a whole lokr_w2 of a Conv1d": ("lokr", {"tensors": {"a.lokr_w1": ones(2, 3), "a.lokr_w2": ones(2, 3, 5)}}, "LF-504", "another product"),
    "LoKr in a LoRA": ("linear", {"tensors": {"a.lokr_w1": ones(2, 3)}}, "LF-506", "no tensor of a LORA adapter"),
    "AdaLoRA without E": ("adalora", {"without": ["fc.lora_E"]}, "LF-303", "lora_E is missing"),
    "AdaLoRA without its first rank": ("adalora", {"init_r": None}, "LF-509", "init_r"),
    "AdaLoRA of other masks": ("adalora_pruned", {"rank_pattern": {"net.fc.lora_E": [True] * 5}}, "LF-507", "keeps 5 ranks"),
    "AdaLoRA with DoRA": ("adalora", {"use_dora": True}, "LF-504", "AdaLoRA does not know"),
    "VeRA without its projection": ("vera", {"without": ["base_model.vera_A"]}, "LF-504", "the projection is not in the file"),
    "a token index twice": ("trainable_tokens", {"trainable_token_indices": {"tok.embed": [3, 3, 11]}}, "LF-503", "stands twice"),
    "a negative token index": ("trainable_tokens", {"trainable_token_indices": {"tok.embed": [-1, 3, 11]}}, "LF-503", "non-negative"),
    "fewer indices than rows": ("trainable_tokens", {"trainable_token_indices": {"tok.embed": [3, 11]}}, "LF-507", "2 token indices"),
    "indices of another module": ("trainable_tokens", {"trainable_token_indices": {"other": [3, 11, 30]}}, "LF-507", "does not list their indices"),
    "a DoRA without a magnitude": ("dora", {"without": ["conv.lora_magnitude"]}, "LF-507", "no magnitude"),
    "a magnitude of another size": ("dora", {"tensors": {"proj.lora_magnitude_vector": ones(20)}}, "LF-404", "28 outputs"),
    "half of a vocabulary": ("embedding_saved", {"tensors": {"model.embed_tokens.base_layer.weight": ones(15, 24)}}, "LF-406", "[15, 24]"),
    "a bias in an attention": ("multihead_attention", {"lora_bias": True, "tensors": {"layers.0.self.attn.lora_B.bias": ones(60)}}, "LF-504", "lora_B.bias in an nn.MultiheadAttention"),
    "an attention of a PEFT to come": ("multihead_attention", {"peft_version": "0.22.0.dev0@1a2b"}, "LF-504", "up to 0.21.2 PEFT adds"),
    "experts of another rank": ("target_parameters_one", {"r": 5, "rank_pattern": {"proj": 4}}, "LF-309", "no whole number of experts of rank 5"),
    "an expert with a bias": ("target_parameters_one", {"tensors": {"mlp.experts.lora_B.bias": ones(16)}}, "LF-303", "lora_A and lora_B, and nothing else"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_rarer_kind_is_refused_by_name(name, tmp_path):
    case, changes, rule, words = FAULTS[name]
    base = lf.open_base(base_of(case)) if case == "vera" else None
    problems = problems_of(lf.load, changed(case, tmp_path / "adapter", **changes), base=base)
    assert {p.rule for p in problems} == {rule}
    assert words in problems[0].what


# What was trained as a whole.


def test_a_head_that_no_setting_lists_replaces_the_base_with_a_warning(tmp_path):
    folder = changed("modules_to_save", tmp_path / "adapter", modules_to_save=None)
    reading = registry.read(folder)[0]
    assert [(w.rule, w.severity, w.where) for w in reading.warnings] == [
        ("LF-507", "warning", "head.bias"),
        ("LF-507", "warning", "head.weight"),
    ]
    assert reading.adapter["head.weight"]["replace"].allows == ("add", "resize")
    assert lf.digest(reading.adapter) == lf.digest(lf.load(adapter_of("modules_to_save")))


def test_every_tensor_of_a_listed_module_is_read_whatever_it_is_called(tmp_path):
    extra = {"head.norm.running_mean": ones(5), "head.cls_token": ones(1, 4), "head.norm.steps": np.array(7)}
    folder = changed("modules_to_save", tmp_path / "adapter", extra)
    adapter = lf.load(folder)
    assert {key: adapter[key].kind for key in extra} == dict.fromkeys(extra, "replace")
    lf.save(adapter, tmp_path / "a.safetensors")
    assert lf.digest(lf.load(tmp_path / "a.safetensors")) == lf.digest(adapter)


def test_what_a_replacement_may_do_besides_depends_on_what_it_is():
    assert {k: u["replace"].allows for k, u in lf.load(adapter_of("vocabulary_resized")).items() if "replace" in u} == {
        "lm_head.weight": ("resize",),
        "model.embed_tokens.weight": ("resize",),
    }
    assert lf.load(adapter_of("bias_all"))["head.bias"]["replace"].allows == ()
    assert lf.load(adapter_of("seq_cls"))["score.weight"]["replace"].allows == ("add", "resize")


def test_a_configuration_that_lists_a_module_which_is_gone_is_not_given_back(tmp_path):
    adapter = lf.load(adapter_of("modules_to_save"))
    rest = {key: update for key, update in adapter.items() if not key.startswith("head.")}
    assert "modules_to_save" not in written(replace(adapter, targets=rest), tmp_path)[1]


# Tokens.


def test_rows_are_ascending_here_and_in_their_own_order_in_peft(tmp_path):
    adapter = lf.load(adapter_of("trainable_tokens"))
    assert adapter["tok.embed.weight"]["rows"].indices.tolist() == [3, 11, 30]
    tensors, config = written(adapter, tmp_path)
    assert config["trainable_token_indices"] == {"tok.embed": [30, 3, 11]}
    name = f"{PREFIX}tok.embed.token_adapter.trainable_tokens_delta"
    assert np.array_equal(tensors[name], load_file(adapter_of("trainable_tokens") / "adapter_model.safetensors")[name])


def test_rows_of_other_tokens_than_the_configuration_lists_are_written_ascending(tmp_path):
    adapter = lf.load(adapter_of("trainable_tokens"))
    rows = lf.Rows(adapter["tok.embed.weight"]["rows"].values, np.array([4, 11, 30]))
    targets = {**adapter.targets, "tok.embed.weight": lf.Update((rows,))}
    assert written(replace(adapter, targets=targets), tmp_path)[1]["trainable_token_indices"] == {
        "tok.embed": [4, 11, 30]
    }


# Parameters that are adapted by name.


def test_two_parameters_of_the_same_shapes_are_not_told_apart(tmp_path):
    pairs = {
        f"m.{inner}lora_{role}.weight": ones(*shape)
        for inner in ("", "base_layer.")
        for role, shape in (("A", (12, 5)), ("B", (7, 12)))
    }
    settings = {"r": 4, "target_modules": [], "target_parameters": ["m.one", "m.two"]}
    folder = changed("target_parameters_one", tmp_path / "adapter", pairs, without=["lora"], **settings)
    base = base_with(tmp_path, m__one=ones(3, 7, 5), m__two=ones(3, 5, 7))
    problem = only_problem(folder, base=base)
    assert problem.rule == "LF-504"
    assert "2 ways to give 2 pairs to one, two" in problem.what


def test_another_base_than_the_trained_one_fits_in_no_way(tmp_path):
    base = base_with(tmp_path, **{f"model__layers__{i}__mlp__experts__{n}": ones(3, 9, 8) for i in (0, 1) for n in ("gate_up_proj", "down_proj")})  # fmt: skip
    problems = problems_of(lf.load, adapter_of("target_parameters"), base=base)
    assert {p.rule for p in problems} == {"LF-504"}
    assert "no ways to give 2 pairs" in problems[0].what


def one_by_one(folder, drop=""):
    """The golden's base as files of Qwen3's mixtures have it: a matrix for each expert, gate and up apart."""
    folder.mkdir()
    found = {}
    for name, tensor in load_file(base_of("target_parameters")).items():
        stem = name.rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            gate, up = np.split(tensor, 2, axis=1)
            found |= {f"{stem}.{i}.gate_proj.weight": np.ascontiguousarray(g) for i, g in enumerate(gate)}
            found |= {f"{stem}.{i}.up_proj.weight": np.ascontiguousarray(u) for i, u in enumerate(up)}
        elif name.endswith("down_proj"):
            found |= {f"{stem}.{i}.down_proj.weight": np.ascontiguousarray(t) for i, t in enumerate(tensor)}
        else:
            found[name] = tensor
    save_file({name: t for name, t in found.items() if name != drop}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return lf.open_base(folder)


def test_a_base_of_single_experts_tells_which_pair_is_whose(tmp_path):
    ours = lf.load(adapter_of("target_parameters"), base=one_by_one(tmp_path / "base"))
    theirs = lf.load(adapter_of("target_parameters"), base=lf.open_base(base_of("target_parameters")))
    assert ours.keys() == theirs.keys()
    for key, update in theirs.items():
        np.testing.assert_array_equal(ours[key].matrix(), update.matrix(), err_msg=key)


def test_the_experts_of_a_file_take_their_own_matrices_of_a_stack(tmp_path):
    base = one_by_one(tmp_path / "base")
    adapter = lf.load(adapter_of("target_parameters"), base=base)
    found = lf.retarget(adapter, base=base).adapter
    stem, whole = "model.layers.0.mlp.experts", adapter["model.layers.0.mlp.experts.gate_up_proj"].matrix()
    for i in range(3):
        np.testing.assert_array_equal(found[f"{stem}.{i}.gate_proj.weight"].matrix(), whole[i, :13])
        np.testing.assert_array_equal(found[f"{stem}.{i}.up_proj.weight"].matrix(), whole[i, 13:])


def test_the_commands_take_the_shapes_of_the_base_that_they_are_given(run, tmp_path):
    one_by_one(tmp_path / "base")
    adapter, stacked = str(adapter_of("target_parameters")), str(base_of("target_parameters"))
    told = run("retarget", adapter, "--base", "base", "-o", "own.safetensors")
    assert told.code == 0, told.err
    assert run("merge", "own.safetensors", "--into", "base", "-o", "merged").code == 0
    assert run("bind", adapter, "--base", stacked, "-o", "bound.safetensors").code == 0
    told = run("merge", adapter, "--into", "base", "-o", "other")
    assert told.code == 1
    assert "retarget ADAPTER --base BASE" in told.err


@pytest.mark.parametrize(
    ("drop", "reason"),
    [
        ("1.up_proj", "does not say which pair is whose"),
        ("0.gate_proj", "does not say which pair is whose"),
        ("2.down_proj", "no ways to give 2 pairs"),  # as if there were two experts
    ],
)
def test_a_base_that_lacks_an_expert_tells_nothing(drop, reason, tmp_path):
    base = one_by_one(tmp_path / "base", f"model.layers.0.mlp.experts.{drop}.weight")
    problems = problems_of(lf.load, adapter_of("target_parameters"), base=base)
    assert [(p.rule, p.where) for p in problems] == [("LF-504", "model.layers.0.mlp.experts")]
    assert reason in problems[0].what


def test_a_name_without_a_dot_means_a_parameter_only_where_the_base_has_it(tmp_path):
    folder = changed("target_parameters_one", tmp_path / "adapter", target_parameters=["down_proj"])
    adapter = lf.load(folder, base=lf.open_base(base_of("target_parameters_one")))
    assert sorted(adapter) == ["mlp.experts.down_proj", "proj.weight"]


def test_one_parameter_needs_no_base_and_says_no_orientation():
    update = lf.load(adapter_of("target_parameters_one"))["mlp.experts.down_proj"]
    assert update.placement is None
    assert update.matrix_shape() == (3, 16, 11)


def test_a_conversion_with_a_base_asks_it_and_the_file_then_knows(tmp_path):
    adapter = lf.convert(
        adapter_of("target_parameters"), tmp_path / "a.safetensors", base=base_of("target_parameters")
    )[0]
    again = lf.load(tmp_path / "a.safetensors")
    assert again["model.layers.0.mlp.experts.down_proj"].placement == lf.Placement((3, 20, 13), (1,), (2,), (0,))
    assert lf.digest(again) == lf.digest(adapter) == lf.digest(loaded("target_parameters"))


# VeRA.


def test_the_width_of_a_lone_module_is_that_of_the_projection(tmp_path):
    folder = changed("vera", tmp_path / "adapter", without=["blocks.10.", "proj_1"])
    adapter = lf.load(folder)
    key = "blocks.0.mlp.fc.weight"
    assert list(adapter) == [key]
    assert testing.relative_error(adapter[key].matrix(), truth_of("vera", "delta")[key]) <= 1e-6


# Writing.


def test_a_convolution_that_is_stored_flat_is_unfolded_once_it_is_bound(tmp_path):
    tensors, _ = written(placed("adalora_pruned"), tmp_path)
    assert tensors[f"{PREFIX}net.conv.lora_A.weight"].shape == (4, 4, 3, 2)
    assert tensors[f"{PREFIX}net.conv.lora_B.weight"].shape == (10, 4, 1, 1)


def test_loha_without_its_configuration_is_written_with_the_model_s_numbers(tmp_path):
    adapter = replace(loaded("loha_kernels"), extensions={})
    _, config = written(adapter, tmp_path)
    assert config["peft_type"] == "LOHA"
    assert config["use_effective_conv2d"] is True
    again = lf.load(tmp_path / "out")
    assert {k: (u.rank, u.scale) for k, u in again.items()} == {k: (u.rank, u.scale) for k, u in adapter.items()}


def test_lokr_without_its_configuration_is_refused(tmp_path):
    problems = problems_of(written, replace(loaded("lokr"), extensions={}), tmp_path)
    assert {p.rule for p in problems} == {"LF-508"}
    assert "only beside the configuration" in problems[0].what


def test_an_attention_whose_projections_have_scales_of_their_own_is_refused(tmp_path):
    adapter = loaded("multihead_attention")
    key = "layers.0.self.attn.out_proj.weight"
    half = lf.Update((replace(adapter[key]["lora"], alpha=adapter[key]["lora"].alpha / 2),), adapter[key].placement)
    problems = problems_of(written, replace(adapter, targets={**adapter.targets, key: half}), tmp_path)
    assert {p.rule for p in problems} == {"LF-508"}
    assert "2 times the scale" in problems[0].what


def test_stacked_experts_are_written_as_peft_stacks_them(tmp_path):
    adapter = replace(loaded("target_parameters_one"), extensions={})
    tensors, config = written(adapter, tmp_path)
    assert config["target_parameters"] == ["mlp.experts.down_proj"]
    original = load_file(adapter_of("target_parameters_one") / "adapter_model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(np.array_equal(tensors[name], original[name]) for name in original)


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_biases_that_vera_trained_are_no_surprise(bias, tmp_path):
    """peft 0.21.2 tuners/vera/config.py: VeRA's own word for its modules' biases."""
    folder = changed("vera", tmp_path / "adapter", {"blocks.1.proj_1.bias": ones(12)}, bias=bias)
    reading, _, _ = registry.read(folder, options=registry.ReadOptions(base=lf.open_base(base_of("vera"))))
    assert not reading.warnings
    assert reading.adapter["blocks.1.proj_1.bias"].kind == "replace"


def test_what_another_method_calls_its_biases_is_refused(tmp_path):
    problem = only_problem(changed("vera", tmp_path / "adapter", bias="lora_only"))
    assert problem.rule == "LF-504"
    assert "none, all and vera_only" in problem.what
