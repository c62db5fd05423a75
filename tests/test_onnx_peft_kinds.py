"""Every kind of adapter that PEFT trains, on a model that torch exported without it: merged and attached, PEFT's own outputs."""

from __future__ import annotations

import onnx
import pytest
from graphs import session

import loraformat as lf
from loraformat.registry import load, open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import attach, merge
from loraformat.verbs.verify import verify

exports = pytest.importorskip("exports", reason="needs the peers: torch, transformers, peft, onnxscript")
torch = pytest.importorskip("torch")
import peft  # noqa: E402

nn = torch.nn
pytestmark = pytest.mark.peer


class Net(nn.Module):
    """A table, kernels, a norm, and Linear layers: what every kind of adapter finds something in."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.norm = nn.LayerNorm(10)
        self.up = nn.Linear(10, 18)
        self.head = nn.Linear(18, 7, bias=False)

    def forward(self, ids):
        h = self.norm(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))
        return self.head(torch.tanh(self.up(h)))


class Picture(nn.Module):
    """Kernels of two axes, wide, in steps, of one pixel."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, (3, 5), padding=(1, 2))
        self.steps = nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.point = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 7)

    def forward(self, x):
        h = torch.tanh(self.point(torch.tanh(self.steps(torch.tanh(self.wide(x))))))
        return self.head(h.mean((2, 3)))


class Attention(nn.Module):
    """torch's own attention, whose three projections are one parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(self.attn(h, h, h, need_weights=False)[0])


class Experts(nn.Module):
    """Two parameters of three axes, one matrix for each expert."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(3, 9, 5))
        self.down_proj = nn.Parameter(torch.zeros(3, 6, 9))

    def forward(self, x):
        h = torch.tanh(torch.einsum("eni,eoi->eno", x.expand(3, -1, -1), self.up_proj))
        return torch.einsum("eni,eoi->eno", h, self.down_proj).sum(0)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.head = nn.Linear(6, 7)

    def forward(self, x):
        return self.head(self.experts(x))


def ids():
    return {"ids": torch.randint(0, 23, (2, 5))}


def picture():
    return {"x": torch.randn(2, 3, 9, 11)}


def rows():
    return {"x": torch.randn(2, 4, 5)}


def flat():
    return {"x": torch.randn(4, 5)}


def recipe(build, inputs, targets, method=peft.LoraConfig, **config):
    return exports.Recipe(build, config, targets, inputs, method=method)


def llama(tied):
    return lambda: exports.llama(tied=tied)


LINEAR = ["up", "head"]
KINDS = {
    "lora, every bias": recipe(Net, ids, 6, target_modules=["embed", *LINEAR], r=3, lora_alpha=5, bias="all"),
    "lora with a bias of its own": recipe(
        Net, ids, 3, target_modules=["up"], r=3, lora_alpha=5, lora_bias=True, modules_to_save=["head"]
    ),
    "dora": recipe(Net, ids, 3, target_modules=["embed", *LINEAR], r=3, lora_alpha=5, use_dora=True),
    "dora of kernels": recipe(
        Picture, picture, 4, target_modules=["wide", "steps", "point", "head"], r=3, lora_alpha=5, use_dora=True
    ),
    "dora of Conv1D": recipe(
        exports.gpt2,
        exports.tokens,
        8,
        target_modules=["c_attn", "c_proj", "c_fc"],
        r=4,
        lora_alpha=11,
        fan_in_fan_out=True,
        use_dora=True,
    ),
    "tokens": recipe(
        llama(False),
        exports.tokens,
        3,
        target_modules=["q_proj"],
        r=3,
        lora_alpha=5,
        trainable_token_indices=[1, 4, 30],
    ),
    "tied tokens": recipe(
        llama(True),
        exports.tokens,
        3,
        target_modules=["q_proj"],
        r=3,
        lora_alpha=5,
        trainable_token_indices=[1, 4, 30],
    ),
    "modules": recipe(Net, ids, 6, target_modules=["up"], r=3, lora_alpha=5, modules_to_save=["norm", "conv", "head"]),
    "loha": recipe(
        Picture,
        picture,
        3,
        peft.LoHaConfig,
        target_modules=["wide", "point", "head"],
        r=3,
        alpha=5,
        use_effective_conv2d=True,
    ),
    "lokr": recipe(
        Picture,
        picture,
        3,
        peft.LoKrConfig,
        target_modules=["wide", "steps", "head"],
        r=2,
        alpha=5,
        use_effective_conv2d=True,
    ),
    "adalora": recipe(
        Net, ids, 2, peft.AdaLoraConfig, target_modules=LINEAR, init_r=4, target_r=3, total_step=100, lora_alpha=5
    ),
    "vera": recipe(Net, ids, 2, peft.VeraConfig, target_modules=LINEAR, r=4),
    "attention": recipe(Attention, rows, 3, target_modules=["attn", "head"], r=3, lora_alpha=5),
    "experts": recipe(
        Mixture, flat, 2, target_modules=["head"], target_parameters=["experts.up_proj"], r=3, lora_alpha=5
    ),
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    made = {}

    def get(kind, exporter):
        if (kind, exporter) not in made:
            torch.manual_seed(len(kind))
            made[kind, exporter] = exports.made(KINDS[kind], exporter, tmp_path_factory.mktemp("kind"))
        return made[kind, exporter]

    return get


@pytest.mark.parametrize("exporter", exports.EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_changed_model_gives_the_outputs_of_peft(kind, exporter, adapted, tmp_path):
    given = adapted(kind, exporter)
    adapter, base = load(given.adapter, base=open_base(given.checkpoint)), open_base(given.model)
    assert len(adapter) == given.targets
    assert relative_error(given.base, given.truth) > 0.02
    for verb in (attach, merge):
        out = tmp_path / f"{verb.__name__}.onnx"
        verb(adapter, base, out)
        onnx.checker.check_model(out, full_check=True)
        for optimise in (True, False):
            found = session(out, optimise=optimise).run(["out"], dict(given.feeds))[0]
            assert relative_error(found, given.truth) <= 1e-5
    verdict = verify(base, adapter, open_base(tmp_path / "merge.onnx"))
    assert (verdict.problems, verdict.touched.keys()) == ([], adapter.keys())
    assert abs(out.stat().st_size - given.model.stat().st_size) < 1000  # merged in place, a tied tensor too
    attached = open_base(tmp_path / "attach.onnx")
    assert lf.digest(extract(attached)) == lf.digest(adapter)
    detach(attached, tmp_path / "detached.onnx")
    assert open_base(tmp_path / "detached.onnx").identity == base.identity
