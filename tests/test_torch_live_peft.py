"""PEFT's own models, live: its adapters are taken out of them, and put on plain models with PEFT's own outputs.

Every golden of PEFT whose numbers are read is tried: the model is built as the golden's maker built it.
"""

import functools
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
    return {case.name: case for case in made.cases()}, models


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
    tolerance = 2e-2 if cases()[0][name].dtype == torch.bfloat16 else 1e-6
    assert testing.relative_error(outputs(model, name), wanted) <= tolerance
    handle.enabled = False
    assert np.array_equal(outputs(model, name), base)
    handle.remove()
    assert_as_before(model, before)
    assert np.array_equal(outputs(model, name), base)
