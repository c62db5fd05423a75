"""Loadable by whom: every rule fires on what it is about and on nothing else, with a reason and its source."""

import json

import numpy as np
import pytest
from peft_goldens import adapter_of

import loraformat as lf
from loraformat import registry
from loraformat.axes import Placement
from loraformat.loaders import judge
from loraformat.parts import Delta, Loha, Lora, Magnitude, Replace, Rows

DRAW = np.random.default_rng(2)
ALL = ("comfyui", "diffusers", "genai", "llama.cpp", "mlx", "ort", "sglang", "trtllm", "vllm")


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def pair(rank=3, scale=2.0, out=17, in_=13):
    return Lora(normal(rank, in_), normal(out, rank), scale, "factor")


def adapter(*parts, key="layers.0.q_proj.weight", place=None, peft=None, **about):
    extensions = {"peft": json.dumps(peft)} if peft else {}
    return lf.Adapter({key: lf.Update(parts, place, **about)}, extensions=extensions)


def verdict(made, name):
    loader = registry.loader(name)
    return judge(made, loader.layouts[0], loader)


KINDS = {
    "magnitude": (pair(), Magnitude(normal(17))),
    "loha": (Loha(normal(17, 3), normal(3, 13), normal(17, 3), normal(3, 13), 1.0, "factor"),),
    "delta": (Delta(normal(17, 13)),),
    "replace": (Replace(normal(17, 13)),),
    "rows": (Rows(normal(2, 13), np.array([1, 5])),),
}
CARRIED = {
    "comfyui": {"loha", "delta", "replace"},
    "diffusers": set(),
    "genai": {"magnitude"},
    "llama.cpp": set(),
    "mlx": {"magnitude"},
    "ort": {"magnitude"},
    "sglang": set(),
    "trtllm": set(),
    "vllm": set(),
}


def test_every_loader_is_known():
    assert sorted(registry.loaders()) == sorted(ALL) == sorted(CARRIED)


@pytest.mark.parametrize("name", ALL)
def test_a_plain_pair_loads_everywhere(name):
    assert verdict(adapter(pair()), name).answer in ("yes", "if")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_a_kind_that_a_loader_lacks_is_named_with_its_target_and_source(name, kind):
    found = verdict(adapter(*KINDS[kind]), name)
    assert (found.answer != "no") == (kind in CARRIED[name]), found.reasons
    for reason in found.reasons:
        assert reason.source
        assert reason.verdict == "if" or reason.where == "layers.0.q_proj.weight"


@pytest.mark.parametrize(
    ("rank", "answer", "said"),
    [(16, "yes", ""), (17, "if", "--max-lora-rank 32"), (300, "if", "--max-lora-rank 320"), (513, "no", "resize")],
)
def test_vllm_has_ranks_of_its_own(rank, answer, said):
    found = verdict(adapter(pair(rank, out=600, in_=601)), "vllm")
    assert found.answer == answer
    assert said in "".join(reason.fix for reason in found.reasons)


@pytest.mark.parametrize(
    ("key", "answer"), [("score.weight", "yes"), ("model.embed_tokens.weight", "if"), ("x.weight", "no")]
)
def test_vllm_knows_some_parameters_that_are_saved_whole(key, answer):
    assert verdict(adapter(Replace(normal(5, 7)), key=key), "vllm").answer == answer


@pytest.mark.parametrize("name", ["sglang", "trtllm"])
def test_one_scale_for_all_is_wrong_by_the_factor_told(name):
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    assert verdict(adapter(pair(scale=2.0), peft=config), name).answer == "yes"
    (reason,) = verdict(adapter(pair(scale=4.0), peft=config), name).reasons
    assert (reason.verdict, "0.5 ×" in reason.what) == ("wrong", True)


@pytest.mark.parametrize("name", ["sglang", "trtllm"])
def test_rslora_is_read_by_one_of_the_two(name):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    made = adapter(Lora(normal(4, 13), normal(17, 4), 6.0, "alpha/sqrt(r)"), peft=config)
    assert verdict(made, name).answer == {"sglang": "no", "trtllm": "yes"}[name]


def test_trtllm_takes_the_larger_side_for_the_hidden_one():
    assert verdict(adapter(pair(rank=13)), "trtllm").answer == "no"
    assert verdict(adapter(pair(rank=12)), "trtllm").answer == "yes"


@pytest.mark.parametrize("name", ["vllm", "sglang", "trtllm", "mlx", "llama.cpp"])
def test_convolutions_are_not_for_language_models(name):
    made = adapter(Lora(normal(3, 5 * 9), normal(7, 3), 1.0, "factor"), place=Placement((7, 5, 3, 3), (0,), (1, 2, 3)))
    assert verdict(made, name).answer == "no"


def test_a_scale_in_the_header_is_not_seen_by_comfyui():
    made = lf.Adapter({"a.weight": lf.Update((pair(scale=1.5),))}, extensions={"diffusers": "{}"})
    assert verdict(made, "comfyui").answer == "no"
    made = lf.Adapter({"a.weight": lf.Update((pair(scale=1.0),))}, extensions={"diffusers": "{}"})
    assert verdict(made, "comfyui").answer == "yes"


def test_another_layout_says_what_to_convert_to():
    found = judge(adapter(pair()), "kohya", registry.loader("vllm"))
    assert found.answer == "no"
    assert "--to peft" in found.reasons[0].fix


def test_the_command_answers_by_exit_code_text_and_json(run):
    assert run("info", adapter_of("rslora_patterns"), "--for", "vllm").code == 0
    told = run("info", adapter_of("rslora_patterns"), "--for", "sglang", "--json")
    assert (told.code, told.json["answer"], told.json["reasons"][0]["verdict"]) == (1, "no", "wrong")
    told = run("info", adapter_of("dora"), "--for", "vllm")
    assert told.code == 1
    assert "DoRA" in told.out
    assert run("info", adapter_of("dora"), "--for", "vlm").err.startswith("LF-705")
