"""torchtune's, litgpt's and TensorRT-LLM's names lead to Hugging Face's and back: other words, and rows in another order.

torchtune itself wrote the weights under both names; what is retargeted must be what it makes of the merged ones.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutants import net
from peft_goldens import HERE as PEFT
from peft_goldens import adapter_of, truth_of
from refused import rules_of
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing
from loraformat.layout import ReadOptions
from loraformat.source import open_source
from loraformat.verbs.retarget import retarget
from loraformat_converters import litgpt, torchtune, trtllm
from loraformat_converters.litgpt import space as litgpt_space
from loraformat_converters.torchtune import rotary
from loraformat_converters.torchtune import space as torchtune_space

GOLDEN = Path(__file__).parent / "golden"
LLAMA = json.loads((PEFT / "llama/base/config.json").read_text())
TORCHTUNE = ("lora", "dora", "qwen2")


def torchtune_adapter(case):
    fact = json.loads((GOLDEN / "torchtune" / case / "golden.json").read_text())
    options = ReadOptions(alpha=fact["lora_alpha"], scale_rule="alpha/r")
    return torchtune.layout.read(open_source(GOLDEN / "torchtune" / case / "adapter_model.pt"), options).adapter


def config_of(case):
    return json.loads((GOLDEN / "torchtune" / case / "config.json").read_text())


def check_torchtune(case):
    """W' under Hugging Face's names is what torchtune's own conversion makes of its own W'."""
    found = retarget(torchtune_adapter(case), "torch", config=config_of(case)).adapter
    base = load_file(GOLDEN / "torchtune" / case / "hf.safetensors")
    truth = load_file(GOLDEN / "torchtune" / case / "truth.safetensors")
    wanted = {n.removeprefix("hf_merged."): t for n, t in truth.items() if n.startswith("hf_merged.")}
    assert found.keys() == wanted.keys()
    for key, update in found.items():
        assert testing.relative_error(update.apply(base[key]), wanted[key]) <= 1e-6, key


def check_litgpt(case):
    """Row for row, the changes of q, k and v are those that litgpt computed in one."""
    adapter = lf.load(GOLDEN / "litgpt" / case / "lit_model.pth.lora")
    groups = 4 if case == "all" else 2
    config = {"num_attention_heads": 4, "num_key_value_heads": groups, "head_dim": 10, "hidden_size": 24}
    found = retarget(adapter, "torch", config=config).adapter
    truth = load_file(GOLDEN / "litgpt" / case / "truth.safetensors")
    stem = "model.layers.1.self_attn"
    pieces = [found[f"{stem}.{leaf}.weight"].delta() for leaf in ("q_proj", "k_proj", "v_proj")]
    assert [len(piece) for piece in pieces] == [40, 10 * groups, 10 * groups]
    whole = truth["delta.transformer.h.1.attn.qkv.weight"]
    assert testing.relative_error(np.concatenate(pieces), whole) <= 1e-6
    back = retarget(found, litgpt.NAMES, config=config).adapter
    assert back.keys() == adapter.keys()
    for key, update in back.items():
        assert testing.relative_error(update.matrix(), adapter[key].matrix()) <= 1e-6


CHECKS = {
    **{case: lambda folder, case=case: check_torchtune(case) for case in TORCHTUNE},
    **{f"litgpt {case}": lambda folder, case=case: check_litgpt(case) for case in ("all", "query_value", "key")},
}


def the_permutation_lost(patch):
    patch.setattr(torchtune_space, "pairs_of_halves", lambda heads, size: np.arange(heads * size))


def the_permutation_backwards(patch):
    patch.setattr(torchtune_space, "pairs_of_halves", lambda h, n: np.argsort(rotary.pairs_of_halves(h, n)))


def heads_of_q_for_k(patch):
    real = rotary.pairs_of_halves
    patch.setattr(torchtune_space, "pairs_of_halves", lambda h, n: real(1, h * n))


def qwen_permuted(patch):
    patch.setattr(torchtune_space, "_PERMUTED", {"qwen2": True})


def key_before_query(patch):
    patch.setattr(litgpt_space, "heads_of", lambda config: (20, 30))


test_the_goldens, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (the_permutation_lost, "lora"),
        (the_permutation_lost, "dora"),
        (the_permutation_backwards, "lora"),
        (heads_of_q_for_k, "lora"),
        (qwen_permuted, "qwen2"),
        (key_before_query, "litgpt query_value"),
    ],
)


@pytest.mark.parametrize("case", TORCHTUNE)
def test_there_and_back_is_the_same_adapter(case):
    adapter = torchtune_adapter(case)
    there = retarget(adapter, "torch", config=config_of(case)).adapter
    back = retarget(there, torchtune.NAMES, config=config_of(case)).adapter
    assert lf.digest(back) == lf.digest(adapter)
    moved = there["model.layers.0.self_attn.q_proj.weight"]["lora"].lora_B
    assert (case == "qwen2") == np.array_equal(moved, adapter["layers.0.attn.q_proj.weight"]["lora"].lora_B)


def test_without_the_model_nothing_is_guessed():
    adapter = torchtune_adapter("lora")
    assert rules_of(retarget, adapter, "torch") == {"LF-604"}
    for config in ({"model_type": "phi3"}, {"model_type": "llama"}, {"model_type": ["llama"]}, {"model_type": "llama", "num_attention_heads": 0, "hidden_size": 24}):  # fmt: skip
        assert rules_of(retarget, adapter, "torch", config=config) == {"LF-604"}
    mlp = replace(adapter, targets={key: u for key, u in adapter.items() if ".mlp." in key})
    assert len(retarget(mlp, "torch").adapter) == len(mlp)
    assert rules_of(retarget, lf.load(GOLDEN / "litgpt/all/lit_model.pth.lora"), "torch") == {"LF-604"}
    rows = trtllm.layout.read(open_source(GOLDEN / "trtllm/plain-float32"), ReadOptions(config=LLAMA)).adapter
    assert rules_of(retarget, rows, "torch") == {"LF-604"}


def test_a_parameter_that_has_no_name_there_is_named():
    adapter = testing.random_adapter(2)
    for space in (torchtune.NAMES, litgpt.NAMES, trtllm.NAMES):
        assert rules_of(retarget, adapter, space, config=LLAMA) == {"LF-602"}


def test_peft_to_tensorrt_and_back_is_pefts_change(run, tmp_path):
    config = str(PEFT / "llama/base/config.json")
    told = run("convert", adapter_of("llama"), "out", "--to", "trtllm", "--base", config, "--fold-scale")
    assert told.code == 0, told.err
    told = run("convert", "out", "back.safetensors", "--base", config)
    assert told.code == 0, told.err
    again = retarget(lf.load(tmp_path / "back.safetensors"), "torch", config=LLAMA).adapter
    testing.check_golden(again, truth_of("llama", "delta"))
    refused = run("convert", adapter_of("llama"), "other", "--to", "trtllm", "--base", config)
    assert refused.code == 1
    assert "--fold-scale" in refused.err


def test_peft_to_torchtune_is_its_own_layout(run, tmp_path):
    config = str(PEFT / "llama/base/config.json")
    assert run("convert", adapter_of("llama"), "tune", "--to", "torchtune", "--base", config).code == 0
    assert run("convert", "tune", "peft", "--base", config).code == 0
    wanted, found = (lf.load(folder) for folder in (adapter_of("llama"), tmp_path / "peft"))
    assert wanted.keys() == found.keys()
    for key, update in wanted.items():
        assert np.array_equal(update.matrix(), found[key].matrix())


@pytest.mark.peer
@pytest.mark.parametrize("case", TORCHTUNE)
def test_the_model_of_transformers_with_peft_gives_torchtunes_own_logits(case, run, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'loraformat[peers]'")
    transformers = pytest.importorskip("transformers", reason="pip install 'loraformat[peers]'")
    peft = pytest.importorskip("peft", reason="pip install 'loraformat[peers]'")
    from safetensors.torch import load_file as load_torch

    folder, fact = GOLDEN / "torchtune" / case, json.loads((GOLDEN / "torchtune" / case / "golden.json").read_text())
    stated = ("--alpha", fact["lora_alpha"], "--rank", fact["lora_rank"], "--scale-rule", "alpha/r")
    told = run("convert", folder / "adapter_model.pt", "peft", "--base", folder / "config.json", *stated)
    assert told.code == 0, told.err
    sizes = {
        "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    if case == "qwen2":
        config = transformers.Qwen2Config(**sizes, rope_theta=1_000_000.0, rms_norm_eps=1e-5)
        model = transformers.Qwen2ForCausalLM(config).eval()
    else:
        config = transformers.LlamaConfig(**sizes, rope_theta=500_000.0, rms_norm_eps=1e-5)
        model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(load_torch(folder / "hf.safetensors"))
    truth = load_torch(folder / "truth.safetensors")
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()(truth["x"]).logits
    assert testing.relative_error(logits.numpy(), truth["y"].numpy()) <= 5e-6  # computed on another processor


# litgpt 0.5.13 scripts/convert_hf_checkpoint.py, of what no adapter changes
_NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}


def llama_of_litgpt(tensors, groups):
    """The base of a golden under Hugging Face's names."""
    found = {"model.norm.weight": tensors["transformer.ln_f.weight"]}
    for name, tensor in tensors.items():
        if name.endswith("attn.qkv.weight"):
            stem = f"model.layers.{name.split('.')[2]}.self_attn"
            cuts = np.split(tensor, [40, 40 + 10 * groups])
            found |= {
                f"{stem}.{leaf}.weight": cut for leaf, cut in zip(("q_proj", "k_proj", "v_proj"), cuts, strict=True)
            }
        elif ".norm_" in name:
            _, _, layer, norm, _ = name.split(".")
            found[f"model.layers.{layer}.{_NORMS[norm]}.weight"] = tensor
        else:
            found |= dict.fromkeys(litgpt_space._TABLE.here(name), tensor)
    return found


@pytest.mark.peer
@pytest.mark.parametrize("case", ["all", "query_value", "key"])
def test_the_model_of_transformers_with_peft_gives_litgpts_own_logits(case, run, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'loraformat[peers]'")
    transformers = pytest.importorskip("transformers", reason="pip install 'loraformat[peers]'")
    peft = pytest.importorskip("peft", reason="pip install 'loraformat[peers]'")
    groups = 4 if case == "all" else 2
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=groups,
        head_dim=10, vocab_size=37, max_position_embeddings=16, rope_theta=10_000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    told = run("convert", GOLDEN / "litgpt" / case / "lit_model.pth.lora", "peft", "--base", "config.json")
    assert told.code == 0, told.err
    model = transformers.LlamaForCausalLM(config).eval()
    base = llama_of_litgpt(load_file(GOLDEN / "litgpt" / case / "base.safetensors"), groups)
    model.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in base.items()})
    truth = load_file(GOLDEN / "litgpt" / case / "truth.safetensors")
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()(torch.from_numpy(truth["x"])).logits
    assert testing.relative_error(logits.numpy(), truth["y"]) <= 2e-6
