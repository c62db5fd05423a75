"""PEFT's own models, live: its adapters are taken out of them, and put on plain models with PEFT's own outputs.

Every golden of PEFT whose numbers are read is tried: the model is built as the golden's maker built it.
"""

import functools
import re
import sys
import warnings

import numpy as np
import pytest
from peft_goldens import HERE, SUPPORTED, adapter_of, loaded
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch", reason="live modules are torch's: pip install 'loraformat[peers]'")
peft = pytest.importorskip("peft", reason="pip install 'loraformat[peers]'")

from loraformat_converters import torch_live  # noqa: E402

# Written from another model than the adapter was trained on (converted, resized, or by an older PEFT): no live model has it.
ELSEWHERE = ("legacy_fused",)
# PEFT reads these back into a model whose vocabulary was resized first.
RESIZED = ("dora_embedding_resized", "embedding_saved", "vocabulary_resized", "tokens_resized")
LIVE = [case for case in SUPPORTED if case not in ELSEWHERE]


@functools.cache
def cases():
    sys.path.insert(0, str(HERE))
    try:
        import cases as made
        import models
    finally:
        sys.path.remove(str(HERE))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return {case.name: case for case in made.CASES}, models


def plain(name):
    """The base model, with the weights that the golden's maker gave it."""
    known, models = cases()
    case = known[name]
    torch.manual_seed(0)
    model = case.model()
    models.fill_base(model, models.Rng(name))
    return model.to(case.dtype).eval()


def wrapped(name):
    return peft.PeftModel.from_pretrained(
        plain(name), adapter_of(name), autocast_adapter_dtype=cases()[0][name].upcast
    ).eval()


@torch.no_grad()
def outputs(model, name):
    x = torch.from_numpy(load_file(HERE / name / "truth.safetensors")["x"])
    y = model(x.to(cases()[0][name].dtype) if x.is_floating_point() else x)
    return (y if isinstance(y, torch.Tensor) else y.logits).float().numpy()


def state(model):
    return {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_as_before(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, (_, values) in before.items():
        assert torch.equal(after[name], values), name


@pytest.mark.parametrize("name", LIVE)
def test_the_adapter_of_a_live_model_is_that_of_its_file(name):
    found, wanted = torch_live.from_module(wrapped(name)), loaded(name)
    if name in RESIZED:  # of the embeddings themselves a live model is the base
        wanted = {key: update for key, update in wanted.items() if update.kind != "replace"}
    assert sorted(found) == sorted(wanted)
    for key, update in found.items():
        kinds = [part.kind for part in update.parts if name not in RESIZED or part.kind != "replace"]
        assert kinds == [part.kind for part in wanted[key].parts if name not in RESIZED or part.kind != "replace"]
        assert update.scale == wanted[key].scale
        if update.additive:
            assert np.array_equal(update.matrix(), wanted[key].matrix())


@pytest.mark.parametrize("mode", ["branch", "merge"])
@pytest.mark.parametrize("name", LIVE)
def test_on_a_plain_model_the_adapter_gives_pefts_own_outputs(name, mode):
    model = plain(name)
    adapter = torch_live.from_module(wrapped(name))
    before, base = state(model), outputs(model, name)
    wanted = load_file(HERE / name / "truth.safetensors")["y"]
    handle = torch_live.apply(adapter, model, mode=mode)
    # a merge rounds W + ΔW, and a chain of layers carries that on; the truth was computed on another processor
    tolerance = 2e-2 if cases()[0][name].dtype == torch.bfloat16 else 2e-6 if mode == "branch" else 4e-6
    assert testing.relative_error(outputs(model, name), wanted) <= tolerance
    handle.enabled = False
    assert np.array_equal(outputs(model, name), base)
    handle.remove()
    assert_as_before(model, before)
    assert np.array_equal(outputs(model, name), base)


def test_the_scale_is_that_of_the_live_layer():
    model = wrapped("rslora")
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.375)
    found, wanted = torch_live.from_module(model), loaded("rslora")
    assert {key: u.scale for key, u in found.items()} == {key: 0.375 * u.scale for key, u in wanted.items()}
    handle = torch_live.apply(found, base := plain("rslora"))
    assert testing.relative_error(outputs(base, "rslora"), outputs(model, "rslora")) <= 1e-6
    handle.remove()


def test_of_several_adapters_one_is_named():
    model = wrapped("linear")
    model.load_adapter(adapter_of("linear"), "second")
    with torch.no_grad():
        model.get_submodule("base_model.model.blocks.0.mlp.fc.lora_B.second").weight.mul_(-3)
    first, second = (torch_live.from_module(model, name) for name in ("default", "second"))
    key = "blocks.0.mlp.fc.weight"
    assert testing.relative_error(second[key].matrix(), -3 * first[key].matrix()) <= 1e-6
    assert lf.digest(torch_live.from_module(model)) == lf.digest(first)  # the active one
    with pytest.raises(lf.LoraFormatError, match="no adapter is called 'third'; there are default, second"):
        torch_live.from_module(model, "third")


def test_an_adapter_that_was_injected_has_the_same_names():
    case = cases()[0]["linear"]
    model = plain("linear")
    injected = peft.inject_adapter_in_model(case.config, model)
    found = torch_live.from_module(injected)
    assert sorted(found) == sorted(loaded("linear"))


def test_methods_without_an_exact_form_are_refused_by_name():
    model = peft.get_peft_model(plain("ia3"), cases()[0]["ia3"].config)
    with pytest.raises(lf.LoraFormatError, match="IA3 multiplies the base weight") as caught:
        torch_live.from_module(model)
    assert {problem.rule for problem in caught.value.problems} == {"LF-504"}


def test_a_model_of_transformers_with_its_own_add_adapter():
    model = plain("llama")
    model.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    found = torch_live.from_module(model)
    assert len(found) == 2 * model.config.num_hidden_layers
    base = plain("llama")
    with torch_live.apply(found, base):
        assert testing.relative_error(outputs(base, "llama"), outputs(model, "llama")) <= 1e-6


def test_what_the_readme_says_of_live_modules_runs():
    readme = (HERE.parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    model = plain("linear")
    before = state(model)
    exec(code, {"peft_model": wrapped("linear"), "model": model})
    assert_as_before(model, before)
