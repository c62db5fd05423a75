"""Seven architectures × two exporters × every way into a graph: PEFT's own outputs, in float32 and in 16 bits.

Switched off it is the base: bit for bit without fusions, where branches are products.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import session

from loraformat import Adapter, LoraFormatError
from loraformat.base import Options
from loraformat.registry import load, open_base
from loraformat.resolve import Hints
from loraformat.strength import strengthen
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.runtime import Session

pytestmark = pytest.mark.peer

MODELS = ("llama", "gpt2", "bert", "vit", "t5", "unet", "whisper")
LIMITS = {"": 1e-5, "-half": 5e-3}
HALF_BY_DYNAMO = ("llama", "unet")
"""Of the rest TorchScript's 16 bits are enough: dynamo takes seconds for each."""

every_export = pytest.mark.parametrize(
    ("name", "exporter", "half"),
    [
        (name, exporter, half)
        for name in MODELS
        for exporter in ("torchscript", "dynamo")
        for half in LIMITS
        if not half or exporter == "torchscript" or name in HALF_BY_DYNAMO
    ],
)


def far(found, truth):
    return relative_error(found.astype(np.float64), truth.astype(np.float64))


def output(path, feeds, **more):
    return session(path, **more).run(["out"], dict(feeds))[0]


@pytest.fixture
def given(name, exporter, half, export):
    return export(name + half, exporter)


@pytest.fixture
def attach(given, tmp_path):
    """(adapters, options) → the model with them."""

    def attached(adapters, **options):
        base, out = open_base(given.model), tmp_path / "out.onnx"
        base.apply(prepare("attach", adapters, base, Options(out, **options)), force=True)
        onnx.checker.check_model(out, full_check=True)
        return out

    return attached


@every_export
def test_the_adapter_alone(given, half, attach, tmp_path):
    limit, adapter = LIMITS[half], load(given.adapter)
    assert len(adapter) == given.targets
    assert far(output(given.model, given.feeds), given.base) <= limit
    assert far(given.base, given.truth) > 0.05
    merge(adapter, open_base(given.model), tmp_path / "merged.onnx")
    assert far(output(tmp_path / "merged.onnx", given.feeds), given.truth) <= limit
    for topology in ("separate", "concat", "folded"):
        assert far(output(attach([("a", adapter)], topology=topology), given.feeds), given.truth) <= limit, topology


@every_export
def test_the_adapter_among_others(name, given, half, attach, tmp_path):
    """Another one of half of its targets, negative and stronger, is beside it."""
    limit, adapter = LIMITS[half], load(given.adapter)
    other = strengthen(Adapter(dict(list(adapter.items())[::2])), -1.5)
    merge(other, open_base(given.model), tmp_path / "other.onnx")
    truths = {None: given.base, "a": given.truth, "b": output(tmp_path / "other.onnx", given.feeds)}
    adapters = [("a", adapter), ("b", other)]

    swap = attach(adapters, mode="swap")
    if half:  # fed, a layer is further from the base than what is asked of it when it is off
        tensors = tort.read(swap.with_name("out.a.onnx_adapter")).tensors
        assert min(layers(swap, given, {**given.feeds, **tensors})) > 1e-3
    running = Session(swap)
    for called, one in adapters:
        running.load(called, one)
    for choice, truth in truths.items():
        assert far(running.use(choice).run(given.feeds)["out"], truth) <= limit, choice
    check_off(swap, given)

    if name == "t5" and half:  # in 16 bits it clamps all rows where a value of any is infinite
        with pytest.raises(LoraFormatError, match=r"LF-608.*leaves no rows"):
            attach(adapters, mode="stack", rows=rows_of(given))
        return
    for provider in ("cpu", "cuda"):
        stack = attach(adapters, mode="stack", rows=rows_of(given), provider=provider)
        running = Session(stack)
        for rows in (["a", "b"], [None, "a"], ["b", None]):
            wanted = np.stack([truths[choice][row] for row, choice in enumerate(rows)])
            assert far(running.use(rows).run(given.feeds)["out"], wanted) <= limit, (provider, rows)
        check_off(stack, given, {"lora.index": np.zeros(2, np.int64)}, exact=provider == "cpu")


def rows_of(given):
    """A mask is no row's own value: exporters gather it by an index of rows."""
    return tuple(name for name in given.feeds if name != "attention_mask")


def check_off(path, given, fed=None, *, exact=True):
    """The base: bit for bit where a pair's branch is added to products, and W is not in a wider one.

    In 16 bits ONNX Runtime's CPU computes in 32, and rounds between two nodes where it finds no third to take 32.
    """
    feeds = {**given.feeds, **(fed or {})}
    plain, found = output(given.model, given.feeds, optimise=False), output(path, feeds, optimise=False)
    single = plain.dtype == np.float32
    assert not (exact and single) or np.array_equal(found, plain)
    assert far(found, plain) <= (1e-6 if single else 2e-3)
    assert far(output(path, feeds), output(given.model, given.feeds)) <= (1e-6 if single else 2e-3)
    if not single:
        assert max(layers(path, given, feeds)) <= 1e-3


def layers(path, given, feeds):
    """How far each changed layer's own output is from the base's, with fusions and without."""
    made = {name for node in onnx.load(given.model).graph.node for name in node.output}
    names = sorted(made & set(Record.of_file(path).base["values"].values()))
    for optimise in (True, False):
        base, changed = (
            session(exposed(model, names, path.parent), optimise=optimise).run(names, dict(fed))
            for model, fed in ((given.model, given.feeds), (path, feeds))
        )
        yield from map(far, changed, base)


def exposed(path, names, folder):
    """A copy of the model that gives these values too."""
    made = onnx.load(path)
    there = {value.name for value in made.graph.output}
    kinds = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None) for name in names)
    made.graph.output.extend(value for value in kinds if value.name not in there)
    onnx.save(made, folder / "exposed.onnx")
    return folder / "exposed.onnx"


def simplified(path, out):
    """MatMul and Add become a Gemm that is called Gemm_3 (onnxsim 0.8)."""
    onnx.save(pytest.importorskip("onnxsim").simplify(onnx.load(path))[0], out)


def in_8_bits(path, out):
    """What stands in MatMul's place has none of its metadata (onnxruntime 1.32)."""
    quantiser = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    made = quantiser.MatMulNBitsQuantizer(onnx.load(path), bits=8, block_size=16, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(str(out), False)


@pytest.mark.parametrize(("tool", "exporter"), [(simplified, "torchscript"), (in_8_bits, "dynamo")])
def test_what_a_tool_leaves_without_a_name_is_found_by_its_bias(tool, exporter, export, tmp_path):
    given = export("bert", exporter)
    tool(given.model, tmp_path / "base.onnx")
    base, adapter = open_base(tmp_path / "base.onnx"), load(given.adapter)
    found = base.resolve(adapter, Hints()).require()
    assert sum(places[0].evidence[0].startswith("bias: ") for places in found.targets.values()) >= given.targets / 2
    base.apply(prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx")))
    lost = far(output(tmp_path / "base.onnx", given.feeds), given.base)
    assert far(output(tmp_path / "out.onnx", given.feeds), given.truth) <= max(2 * lost, 1e-5) < 0.05
