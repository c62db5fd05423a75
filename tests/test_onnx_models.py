"""Small networks of every kind, exported by torch: merged and attached, they give torch's own outputs with W'."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import session

from loraformat import Adapter, Lora, Magnitude, Placement, Replace, Rows, Update, digest
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import prepare

torch = pytest.importorskip("torch", reason="needs the peers: torch, transformers, peft, onnxscript")
nn = torch.nn
pytestmark = pytest.mark.peer

EXPORTERS = ("torchscript", "dynamo")


class ConvNet(nn.Module):
    """Kernels, strides, dilations, a norm between, a transposed convolution, a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 6, 3, dilation=2, padding=2, bias=False)
        self.up = nn.ConvTranspose2d(6, 5, (4, 3), stride=2, padding=1, output_padding=(0, 1))
        self.point = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        h = torch.tanh(self.norm(self.first(x)))
        h = torch.relu(self.point(torch.relu(self.up(torch.relu(self.second(h))))))
        return self.head(h.mean((2, 3)))


class Attention(nn.Module):
    """An embedding, heads, an Einsum over experts, and a head that is tied to nothing."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.norm = nn.LayerNorm(12)
        self.q = nn.Linear(12, 10)
        self.experts = nn.Parameter(torch.zeros(3, 10, 9))
        self.head = nn.Linear(9, 11, bias=False)

    def forward(self, ids):
        h = self.q(self.norm(self.embed(ids)))
        return self.head(torch.einsum("bto,eoh->bteh", h, self.experts).relu().sum(2))


def vit():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=12,
        patch_size=4,
        attn_implementation="eager",
    )

    class Model(transformers.ViTModel):
        def forward(self, x):
            return super().forward(pixel_values=x).last_hidden_state

    return Model(config, add_pooling_layer=False)


def t5():
    import transformers

    config = transformers.T5Config(
        vocab_size=31,
        d_model=16,
        d_kv=5,
        d_ff=28,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )

    class Model(transformers.T5EncoderModel):
        def forward(self, ids):
            return super().forward(input_ids=ids).last_hidden_state

    return Model(config)


def image():
    return {"x": torch.randn(2, 3, 12, 12)}


def ids():
    return {"ids": torch.randint(0, 23, (2, 5))}


MODELS = {"convnet": (ConvNet, image), "attention": (Attention, ids), "vit": (vit, image), "t5": (t5, ids)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}

    def get(name, exporter):
        if (name, exporter) not in made:
            made[name, exporter] = export(name, exporter, tmp_path_factory.mktemp(f"{name}-{exporter}"))
        return made[name, exporter]

    return get


def export(name, exporter, folder):
    torch.set_num_threads(1)
    torch.manual_seed(len(name))
    build, inputs = MODELS[name]
    model, given = build().eval(), inputs()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key.lower() else 0.0, 0.25)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    spelling = {"dynamo": True, "opset_version": 18} if exporter == "dynamo" else {"dynamo": False, "opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": list(given), "output_names": ["out"], "verbose": False}
        torch.onnx.export(model, tuple(given.values()), str(folder / "base.onnx"), **names, **spelling)
    return model, given, folder / "base.onnx"


def update_for(name, parameter, kind, draw, *, embedding):
    """An update of the parameter, with torch's own axes."""
    shape = tuple(parameter.shape)

    def normal(*sizes):
        return (draw.standard_normal(sizes) / 3).astype(np.float32)

    if len(shape) == 1:
        return Update((Replace(normal(*shape) + 1),))
    if "up." in name:
        place = Placement(shape, (1,), (0, 2, 3))
    elif embedding:
        place = Placement(shape, (1,), (0,))
    elif "experts" in name:
        place = Placement(shape, (0, 2), (1,))
    else:
        place = Placement(shape, (0,), tuple(range(1, len(shape))))
    if kind == "replace":
        return Update((Replace(normal(*shape)),), place)
    *batch, out, in_ = place.matrix_shape
    pair = Lora(normal(*batch, 2, in_), normal(*batch, out, 2), 3.0, "alpha/r")
    parts = (pair, Magnitude(abs(normal(*batch, out)) + 1)) if kind == "dora" else (pair,)
    if kind == "rows":
        parts = (Rows(normal(2, *shape[1:]), np.array([1, shape[0] - 1])),)
    unplaced = len(shape) == 2 and kind in ("lora", "dora") and not embedding
    return Update(parts, None if unplaced else place, op="embedding" if embedding and kind != "replace" else None)


def targets(model, base, adapters):
    """The parameters whose place in the graph names tell, and whose operator can carry a change; and no other."""
    from loraformat import Hints

    found = base.resolve(adapters, Hints()).targets
    kept = (key for key, places in found.items() if all(place.handle.refusal is None for place in places))
    return Adapter({key: adapters[key] for key in kept})


LEAST = {"convnet": 5, "attention": 3, "vit": 13, "t5": 14}
"""Matrices that must be found in each, by names alone."""


KINDS = ("lora", "dora", "replace", "rows")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_changed_model_gives_the_outputs_of_torch(name, exporter, first, exported, tmp_path):
    """One adapter with a kind of its own for each parameter, in turns."""
    model, given, path = exported(name, exporter)
    base, draw = open_base(path), np.random.default_rng(7)
    parameters = dict(model.named_parameters())
    kinds = {key: KINDS[(first + i) % 4] for i, key in enumerate(k for k, p in parameters.items() if p.ndim > 1)}
    looked_up = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, nn.Embedding)}
    every = Adapter(
        {k: update_for(k, p, kinds.get(k, "replace"), draw, embedding=k in looked_up) for k, p in parameters.items()}
    )
    adapter = targets(model, base, every)
    matrices = [key for key in adapter if parameters[key].ndim > 1]
    assert len(matrices) >= LEAST[name], sorted(every.keys() - adapter.keys())
    feeds = {key: value.numpy() for key, value in given.items()}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    with torch.no_grad():
        plain = model(**given).numpy()
        for key, update in adapter.items():
            place = update.placement or Placement(tuple(before[key].shape), (0,), (1,)[: before[key].ndim - 1])
            parameters[key].copy_(torch.from_numpy(replace(update, placement=place).apply(before[key].numpy())))
        truth = model(**given).numpy()
        for key, value in before.items():
            parameters[key].copy_(value)
    assert relative_error(plain, truth) > 0.05
    for verb in ("merge", "attach"):
        out = tmp_path / f"{verb}.onnx"
        plan = prepare(verb, [("default", adapter)], base, Options(out))
        base.apply(plan)
        onnx.checker.check_model(out, full_check=True)
        for optimise in (True, False):
            assert relative_error(session(out, optimise=optimise).run(["out"], feeds)[0], truth) <= 1e-5
    assert prove(base, plan).holds
    assert digest(extract(open_base(out))) == digest(adapter)
    detach(open_base(out), tmp_path / "detached.onnx")
    assert open_base(tmp_path / "detached.onnx").identity == base.identity
