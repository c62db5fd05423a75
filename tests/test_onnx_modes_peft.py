"""What torch exported and PEFT adapted, as swap and as stack: PEFT's own outputs for what is fed or chosen, else the base's."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import adapter, lora, session

from loraformat import Adapter, digest
from loraformat.base import Options
from loraformat.registry import load, open_base
from loraformat.strength import strengthen
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.runtime import Session

pytestmark = pytest.mark.peer

MODELS = ("bert", "roberta", "llama-tied", "gpt2", "shared-2d", "shared-3d")
every_export = pytest.mark.parametrize(
    ("name", "exporter"), [(name, exporter) for name in MODELS for exporter in ("torchscript", "dynamo")]
)
every_form = pytest.mark.parametrize(("provider", "select"), [("cpu", "index"), ("cpu", "weights"), ("cuda", "index")])


def put(given, out, adapters, **options):
    base = open_base(given.model)
    base.apply(prepare("attach", adapters, base, Options(out, **options)))
    onnx.checker.check_model(out, full_check=True)


def adapters_of(given):
    """PEFT's, and another of half of its targets, negative and stronger."""
    first = load(given.adapter)
    some = Adapter(dict(list(first.items())[::2]))
    return [("peft", first), ("other", strengthen(some, -1.5))]


@every_export
@pytest.mark.parametrize("slots", ["optional", "required"])
def test_the_adapter_that_is_fed_acts_and_no_other(name, exporter, slots, export, tmp_path):
    given, out = export(name, exporter), tmp_path / "out.onnx"
    adapters = adapters_of(given)
    put(given, out, adapters, mode="swap", slots=slots)
    merge(adapters[1][1], open_base(given.model), tmp_path / "other.onnx")
    wanted = {"peft": given.truth, "other": session(tmp_path / "other.onnx").run(["out"], dict(given.feeds))[0]}
    for optimise in (True, False):
        running = session(out, optimise=optimise)
        for called, truth in wanted.items():
            path = tmp_path / f"out.{called}.onnx_adapter"
            if slots == "optional":
                held, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
                held.Load(str(path))
                options.add_active_adapter(held)
                found = running.run(["out"], dict(given.feeds), options)[0]
            else:
                tensors = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
                found = running.run(["out"], {**given.feeds, **{n: v.numpy() for n, v in tensors.items()}})[0]
            assert relative_error(found, truth) <= 1e-5
        if slots == "optional":
            found = running.run(["out"], dict(given.feeds))[0]
            plain = session(given.model, optimise=optimise).run(["out"], dict(given.feeds))[0]
            assert relative_error(found, plain) <= 1e-6
            assert optimise or np.array_equal(found, plain)
    detach(open_base(out), tmp_path / "again.onnx")
    assert open_base(tmp_path / "again.onnx").identity == open_base(given.model).identity


@every_export
@every_form
def test_every_row_has_the_adapter_that_it_chose(name, exporter, provider, select, export, tmp_path):
    given, out = export(name, exporter), tmp_path / "out.onnx"
    adapters = adapters_of(given)
    put(given, out, adapters, mode="stack", rows=(next(iter(given.feeds)),), provider=provider, select=select)
    merge(adapters[1][1], open_base(given.model), tmp_path / "other.onnx")
    other = session(tmp_path / "other.onnx").run(["out"], dict(given.feeds))[0]
    truths = [given.base, given.truth, other]
    rows = len(given.base)
    for chosen in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        index = np.array(chosen[:rows])
        weights = np.eye(3, 2, -1, dtype=np.float32)[index]
        fed = {"lora.index": index} if select == "index" else {"lora.weights": weights}
        wanted = np.stack([truths[n][row] for row, n in enumerate(index)])
        for optimise in (True, False):
            found = session(out, optimise=optimise).run(["out"], {**given.feeds, **fed})[0]
            assert relative_error(found, wanted) <= 1e-5
    for called, one in adapters:
        assert len(extract(open_base(out), name=called)) == len(one)
    detach(open_base(out), tmp_path / "again.onnx")
    assert open_base(tmp_path / "again.onnx").identity == open_base(given.model).identity


every_dora = pytest.mark.parametrize("name", ["dora-2d", "dora-3d"])


@pytest.mark.parametrize("slots", ["optional", "required"])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@every_dora
def test_a_dora_of_peft_is_fed_and_taken_away(name, exporter, slots, export, tmp_path):
    """From the DoRA to a plain pair, to the base, and to the DoRA that the runtime reads from PEFT's own folder."""
    given, out = export(name, exporter), tmp_path / "out.onnx"
    dora, plain = load(given.adapter), adapter({"called_twice.weight": lora(6, 6, rank=3)})
    put(given, out, [("peft", dora), ("plain", plain)], mode="swap", slots=slots)
    merge(plain, open_base(given.model), tmp_path / "plain.onnx")
    other = session(tmp_path / "plain.onnx").run(["out"], dict(given.feeds))[0]
    exact = onnxruntime.SessionOptions()
    exact.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for options in (None, exact):
        running = Session(out, options=options)
        running.load("peft", out.with_name("out.peft.onnx_adapter"))
        running.load("plain", out.with_name("out.plain.onnx_adapter"))
        running.load("folder", given.adapter)
        for choice, wanted in (("peft", given.truth), ("plain", other), (None, given.base), ("folder", given.truth)):
            assert relative_error(running.use(choice).run(given.feeds)["out"], wanted) <= 1e-5
    plain_base = session(given.model, optimise=False).run(["out"], dict(given.feeds))[0]
    assert np.array_equal(running.use(None).run(given.feeds)["out"], plain_base)
    detach(open_base(out), tmp_path / "again.onnx")
    assert open_base(tmp_path / "again.onnx").identity == open_base(given.model).identity


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@every_dora
def test_a_row_has_the_magnitude_of_its_own_adapter(name, exporter, provider, export, tmp_path):
    """A DoRA of PEFT beside a plain pair: at a Linear with a bias, called twice."""
    given, out = export(name, exporter), tmp_path / "out.onnx"
    dora, plain = load(given.adapter), adapter({"called_twice.weight": lora(6, 6, rank=3)})
    assert {update.kind for update in dora.values()} == {"dora"}
    put(given, out, [("peft", dora), ("plain", plain)], mode="stack", rows=("x",), provider=provider)
    merge(plain, open_base(given.model), tmp_path / "plain.onnx")
    truths = [given.base, given.truth, session(tmp_path / "plain.onnx").run(["out"], dict(given.feeds))[0]]
    rows = len(given.base)
    for chosen in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 0, 0]):
        index = np.array(chosen[:rows])
        wanted = np.stack([truths[n][row] for row, n in enumerate(index)])
        for optimise in (True, False):
            found = session(out, optimise=optimise).run(["out"], {**given.feeds, "lora.index": index})[0]
            assert relative_error(found, wanted) <= 1e-5
        if not any(chosen):
            assert np.array_equal(found, session(given.model, optimise=False).run(["out"], dict(given.feeds))[0])
    assert digest(extract(open_base(out), name="peft")) == digest(dora)
    detach(open_base(out), tmp_path / "again.onnx")
    assert open_base(tmp_path / "again.onnx").identity == open_base(given.model).identity
