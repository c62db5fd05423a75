"""Names and orders of rows in MLX and GGUF: what is converted is what the tools' own converters make."""

import json
import shutil
from dataclasses import replace

import mlx_goldens
import numpy as np
import pytest
from gguf_goldens import CASES, FILES, HERE, TOLERANCE, config_of, file_of, truth_of
from refused import problems_of
from safetensors.numpy import save_file

import loraformat as lf
from loraformat import Adapter, Lora, Update, testing
from loraformat.verbs.retarget import retarget
from loraformat_converters.gguf import keys
from loraformat_converters.gguf.file import GgufFile
from loraformat_converters.gguf.rotary import interleaved

MOE = ("mixtral", "qwen2_moe", "qwen3_moe")


def peft_of(case):
    return HERE / case / "peft"


def converted(case, folder):
    """The PEFT adapter of a golden in GGUF, by the base's config.json."""
    lf.convert(peft_of(case), folder / "a.gguf", base=HERE / case / "config.json")
    return folder / "a.gguf"


def check_converted(case, folder):
    """In llama.cpp's model the converted adapter changes what merging changes: rsLoRA and patterns too."""
    testing.check_golden(lf.load(converted(case, folder)), truth_of(case))


@pytest.mark.parametrize("case", CASES)
def test_the_change_in_llama_cpps_model_is_that_of_merging(case, tmp_path):
    check_converted(case, tmp_path)


@pytest.mark.parametrize("case", [case for case in FILES if case not in TOLERANCE])
def test_the_tensors_are_those_of_llama_cpps_converter(case, tmp_path):
    """Where it is right: names, shapes and bytes."""
    ours, theirs = GgufFile(converted(case, tmp_path)), GgufFile(file_of(case))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name
    wanted = ("general.architecture", "general.type", "adapter.type", keys.ALPHA)
    assert {key: ours.metadata[key] for key in wanted} == {key: theirs.metadata[key] for key in wanted}


@pytest.mark.parametrize("case", [case for case in CASES if case not in MOE])
def test_a_gguf_file_goes_back_to_peft(case, tmp_path):
    """To the same factors; where an alpha was folded, to the same change."""
    config = HERE / case / "config.json"
    lf.convert(converted(case, tmp_path), tmp_path / "peft", to_layout="peft", base=config)
    again, ours = lf.load(tmp_path / "peft"), lf.load(peft_of(case))
    assert again.keys() == ours.keys()
    for key, update in ours.items():
        assert np.array_equal(again[key]["lora"].lora_A, update["lora"].lora_A), key
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-6, key


@pytest.mark.parametrize("case", MOE)
def test_the_experts_of_a_stack_go_back_where_the_base_tells_how_they_lie(case, tmp_path):
    ours = lf.load(peft_of(case))
    path = converted(case, tmp_path)
    problems = problems_of(lf.convert, path, tmp_path / "peft", base=HERE / case / "config.json")
    assert {p.rule for p in problems} == {"LF-603"}
    assert "give the base" in problems[0].fix
    (tmp_path / "base").mkdir()
    shutil.copy(HERE / case / "config.json", tmp_path / "base")
    weights = {key: np.zeros(update.matrix_shape(), np.float32) for key, update in ours.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    lf.convert(path, tmp_path / "peft", base=tmp_path / "base")
    again = lf.load(tmp_path / "peft")
    assert again.keys() == ours.keys()
    for key, update in ours.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-7, key


def test_the_experts_of_one_parameter_are_the_same_stacks(tmp_path):
    """transformers 5 has gate and up of all experts in one parameter [E, 2·out, in]."""
    draw = np.random.default_rng(2)
    a, b = draw.standard_normal((3, 2, 24)).astype(np.float32), draw.standard_normal((3, 28, 2)).astype(np.float32)
    fused = Adapter({"model.layers.0.mlp.experts.gate_up_proj": Update((Lora(a, b, 4.0, "alpha/r"),))})
    for space, stacks in (
        ("gguf", ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")),
        ("mlx", tuple(f"model.layers.0.mlp.switch_mlp.{leaf}_proj.weight" for leaf in ("gate", "up"))),
    ):
        found = retarget(fused, space, config=config_of("qwen3_moe")).adapter
        assert found.keys() == set(stacks)
        whole = fused["model.layers.0.mlp.experts.gate_up_proj"].matrix()
        for stack, part in zip(stacks, (whole[:, :14], whole[:, 14:]), strict=True):
            np.testing.assert_allclose(found[stack].matrix(), part, rtol=1e-6, atol=1e-6)


# What the names and the order of rows depend on.


def llama(**targets):
    draw = np.random.default_rng(1)
    made = {f"model.layers.0.self_attn.{leaf}.weight": Update((Lora(draw.standard_normal((2, 24)), draw.standard_normal((rows, 2)), 4.0, "alpha/r"),)) for leaf, rows in targets.items()}  # fmt: skip
    return Adapter(made)


def test_without_the_config_nothing_is_guessed():
    for space in ("gguf", "mlx"):
        (problem,) = problems_of(retarget, llama(q_proj=24), space)
        assert problem.rule == "LF-604"
        assert "--base config.json" in problem.fix
        (problem,) = problems_of(retarget, llama(q_proj=24), space, config={"model_type": "bloom"})
        assert "bloom" in problem.what


def test_the_number_of_heads_is_needed_only_where_rows_are_reordered():
    config = {"model_type": "llama"}
    (problem,) = problems_of(retarget, llama(q_proj=24, v_proj=24), "gguf", config=config)
    assert (problem.rule, problem.where) == ("LF-604", "model.layers.0.self_attn.q_proj.weight")
    assert retarget(llama(v_proj=24), "gguf", config=config).adapter.keys() == {"blk.0.attn_v.weight"}
    assert len(retarget(llama(q_proj=24), "gguf", config={"model_type": "qwen2"}).adapter) == 1


def test_heads_that_do_not_divide_the_rows_are_refused():
    config = {"model_type": "llama", "num_attention_heads": 5}
    (problem,) = problems_of(retarget, llama(q_proj=24), "gguf", config=config)
    assert problem.rule == "LF-606"
    config = {"model_type": "llama", "num_attention_heads": "4"}
    assert problems_of(retarget, llama(q_proj=24), "gguf", config=config)[0].rule == "LF-604"


def test_a_key_has_as_many_heads_as_the_query_where_the_config_names_no_others():
    config = {"model_type": "llama", "num_attention_heads": 4}
    ours = llama(k_proj=24)
    found = retarget(ours, "gguf", config=config).adapter["blk.0.attn_k.weight"].matrix()
    assert np.array_equal(found, ours["model.layers.0.self_attn.k_proj.weight"].matrix()[interleaved(24, 4)])
    found = retarget(ours, "gguf", config=config | {"num_key_value_heads": 2}).adapter["blk.0.attn_k.weight"].matrix()
    assert np.array_equal(found, ours["model.layers.0.self_attn.k_proj.weight"].matrix()[interleaved(24, 2)])


def test_a_gguf_file_of_an_architecture_that_reorders_nothing_goes_back_without_a_config(tmp_path):
    lf.convert(file_of("qwen2"), tmp_path / "peft")
    assert lf.load(tmp_path / "peft").keys() == lf.load(peft_of("qwen2")).keys()
    problems = problems_of(lf.convert, file_of("llama"), tmp_path / "other")
    assert {p.rule for p in problems} == {"LF-604"}


def test_a_target_that_has_no_name_there_is_named():
    other = replace(llama(v_proj=24), targets={**llama(v_proj=24), "model.norm.weight": llama(v_proj=24)["model.layers.0.self_attn.v_proj.weight"]})  # fmt: skip
    problems = problems_of(retarget, other, "gguf", config={"model_type": "llama"})
    assert [(p.rule, p.where) for p in problems] == [("LF-602", "model.norm.weight")]


# MLX.


@pytest.mark.parametrize("case", ["linear", "every", "embedding", "experts", "dora"])
def test_an_mlx_adapter_goes_to_torch_and_back(case, tmp_path):
    names = json.loads((mlx_goldens.HERE / case / "golden.json").read_text())
    config = {"model_type": names["model"], "num_experts": 5}
    ours = lf.load(mlx_goldens.adapter_of(case))
    base = set()
    if case == "experts":
        checkpoint = {}
        for key, update in ours.items():
            if "switch_mlp" in key:
                shape = update.matrix_shape()[1:]
                checkpoint |= {key.replace("switch_mlp", f"experts.{e}"): np.zeros(shape, np.float32) for e in range(5)}
            else:
                checkpoint[key] = np.zeros(update.matrix_shape(), np.float32)
        save_file(checkpoint, tmp_path / "base.safetensors")
        base = set(checkpoint)
    opened = lf.open_base(tmp_path / "base.safetensors") if base else None
    torch = retarget(ours, "torch", base=opened, config=config).adapter
    assert torch.keys() == (base or ours.keys())
    again = retarget(torch, "mlx", config=config).adapter
    assert again.keys() == ours.keys()
    for key, update in ours.items():
        assert np.array_equal(again[key].matrix(), update.matrix()), key
        assert again[key].kind == update.kind


def test_peft_goes_to_mlx_under_the_same_names(tmp_path):
    ours = lf.load(peft_of("rslora_patterns"))
    lf.convert(
        peft_of("rslora_patterns"), tmp_path / "mlx", to_layout="mlx", base=HERE / "rslora_patterns" / "config.json"
    )
    found = lf.load(tmp_path / "mlx")
    assert found.keys() == ours.keys()
    for key, update in ours.items():
        assert testing.relative_error(found[key].matrix(), update.matrix()) <= 1e-6, key


def test_the_goldens_are_all_there():
    assert len(CASES) == 26
    assert set(CASES) - set(FILES) == {"rslora", "patterns", "rslora_patterns", "gpt2"}


def test_from_peft_through_mlx_and_gguf_and_back_the_change_stays(tmp_path):
    """rsLoRA with patterns: folded, padded, transposed and reordered on the way."""
    config, ours = HERE / "rslora_patterns" / "config.json", lf.load(peft_of("rslora_patterns"))
    lf.convert(peft_of("rslora_patterns"), tmp_path / "mlx", to_layout="mlx", base=config)
    lf.convert(tmp_path / "mlx", tmp_path / "a.gguf", base=config)
    lf.convert(tmp_path / "a.gguf", tmp_path / "peft", base=config)
    testing.check_golden(lf.load(tmp_path / "a.gguf"), truth_of("rslora_patterns"))
    again = lf.load(tmp_path / "peft")
    assert again.keys() == ours.keys()
    for key, update in ours.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-6, key


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma"])
def test_a_whole_checkpoint_as_the_base_gives_the_same(case, tmp_path):
    """Bound to it first: placed, with sketches, the Conv1D of GPT-2 as [in, out]."""
    (tmp_path / "base").mkdir()
    shutil.copy(HERE / case / "config.json", tmp_path / "base")
    draw, weights = np.random.default_rng(5), {}
    for key, update in lf.load(peft_of(case)).items():
        shape = update.matrix_shape()
        turned = update.op == "embedding" or case == "gpt2"
        weights[key] = draw.standard_normal(shape[::-1] if turned else shape).astype(np.float32)
    save_file(weights, tmp_path / "base" / "model.safetensors")
    lf.convert(peft_of(case), tmp_path / "bound.lora.safetensors", base=tmp_path / "base")
    for source in (peft_of(case), tmp_path / "bound.lora.safetensors"):
        lf.convert(source, tmp_path / "a.gguf", base=tmp_path / "base", force=True)
        testing.check_golden(lf.load(tmp_path / "a.gguf"), truth_of(case))
