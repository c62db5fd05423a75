"""Weights in the bodies of If, Loop and Scan, as torch's dynamo exporter writes torch.cond, while_loop and scan: PEFT's numbers."""

import onnx
import pytest
import torch
from graphs import session
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import loraformat as lf
from loraformat.resolve import Hints
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach, merge
from loraformat_converters.onnx.runtime import Session

pytestmark = pytest.mark.peer


class Branches(nn.Module):
    """A module in each branch of an If."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x):
        h = self.first(x)
        return torch.cond(h.sum() > 0, lambda h: self.one(h).relu(), lambda h: self.two(h).sin(), (h,))


class Both(nn.Module):
    """One module in both branches of an If, and before it."""

    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x):
        branches = (lambda h: self.fc(h).relu(), lambda h: self.fc(h).sin())
        return self.last(torch.cond(x.sum() > 0, *branches, (self.fc(x),)))


class Repeated(Both):
    """A module in the body of a Loop."""

    def forward(self, x):
        _, h = while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, torch.tanh(self.fc(h))), (torch.tensor(0), x))
        return self.last(h)


class Scanned(Both):
    """A module in the body of a Scan, which dynamo gives a turned copy of its weight, under no name: its bias tells."""

    def forward(self, x):
        def step(carried, value):
            now = torch.tanh(self.fc(carried) + value)
            return now, now.clone()

        return self.last(scan(step, torch.zeros_like(x[0]), x)[1])


MAPS = {"Both": {"fc.weight": "fc.weight"}}
"""Model → what the graph does not tell."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Class → (model, adapter, inputs, what PEFT computes of each), made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.__name__)
            torch.manual_seed(0)
            plain, x = kind().eval(), torch.randn(4, 8)
            torch.onnx.export(plain, (x,), dynamo=True, verbose=False).save(folder / "base.onnx")
            linears = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear)]
            config = LoraConfig(r=2, lora_alpha=4, target_modules=linears, init_lora_weights=False)
            tuned = get_peft_model(plain, config).eval()
            tuned.save_pretrained(folder / "adapter")
            with torch.no_grad():
                wanted = [tuned(v).numpy() for v in (x, -x)]
            made[kind] = folder / "base.onnx", lf.load(folder / "adapter"), [x.numpy(), -x.numpy()], wanted
        return made[kind]

    return get


def stated(kind):
    return Hints(names=MAPS.get(kind.__name__, {}))


@pytest.mark.parametrize("kind", [Branches, Both, Repeated, Scanned])
@pytest.mark.parametrize("way", ["merge", "separate", "concat", "folded", "swap"])
def test_what_a_body_computes_is_what_peft_computes(kind, way, exported, tmp_path):
    path, update, inputs, wanted = exported(kind)
    base, out = lf.open_base(path), tmp_path / "out.onnx"
    if way == "merge":
        merge(update, base, out, stated(kind))
    elif way == "swap":
        attach({"one": update}, base, out, stated(kind), mode="swap")
    else:
        attach(update, base, out, stated(kind), topology=way)
    onnx.checker.check_model(out, full_check=True)
    running = Session(out) if way == "swap" else session(out)
    if way == "swap":
        running.load("one", update)
        running = running.use("one")
    (name,) = (i.name for i in session(path).get_inputs())
    for x, truth in zip(inputs, wanted, strict=True):
        found = running.run({name: x}) if way == "swap" else running.run(None, {name: x})
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
        assert relative_error(found, truth) <= 1e-5
        assert relative_error(session(path).run(None, {name: x})[0], truth) > 0.1


def test_a_call_in_a_body_that_nobody_names_is_no_other_modules(exported, tmp_path):
    path, update, *_ = exported(Both)
    for verb in (merge, attach):
        with pytest.raises(lf.LoraFormatError, match=r"LF-609 .*has no module's name[^@]*@ fc\.weight"):
            verb(update, lf.open_base(path), tmp_path / "out.onnx")


@pytest.mark.parametrize("kind", [Branches, Repeated])
def test_a_stack_does_not_follow_rows_into_a_body(kind, exported, tmp_path):
    path, update, *_ = exported(kind)
    with pytest.raises(
        lf.LoraFormatError, match=r"LF-608 .*it lies in a graph inside a node, where rows are not followed"
    ):
        attach({"a": update, "b": update}, lf.open_base(path), tmp_path / "out.onnx", mode="stack", rows=("x",))
