"""Adapters in the weights themselves: what acts is what merging gives, and W comes back bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import updates
from graphs import adapter, lora, model, save, session
from installed import needs
from test_onnx_runtime import CHOICES, GIVEN, TEXT, X, truth  # noqa: F401  (a fixture)

import loraformat as lf
from loraformat import Adapter, LoraFormatError, Placement, Update
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge
from loraformat_converters.onnx import effective
from loraformat_converters.onnx.effective import Effective

BOTH = pytest.mark.parametrize("captured", [False, True])


@BOTH
def test_what_is_chosen_acts_in_weights_that_stay_where_they_are(captured, truth, tmp_path):  # noqa: F811
    path = save(model(TEXT), tmp_path / "m.onnx")
    before = path.read_bytes()
    lf.save(GIVEN["q"], tmp_path / "q.safetensors")
    running = Effective(path, GIVEN | {"q": tmp_path / "q.safetensors"}, captured=captured)
    addresses = {name: value.data_ptr() for name, value in running.values.items()}
    assert running.names == ["both", "q", "v"]
    assert np.array_equal(running.run(X)["y"], truth(None))
    for choice in [*CHOICES, *CHOICES[::-1]]:
        running.use(choice)
        assert relative_error(running.run(X, ["y"])["y"], truth(choice)) <= 3e-6
    running.use("both")
    running.use(None)
    assert np.array_equal(running.run(X)["y"], truth(None))
    assert {name: value.data_ptr() for name, value in running.values.items()} == addresses
    assert path.read_bytes() == before


def test_a_weight_of_another_adapter_comes_back(truth, tmp_path):  # noqa: F811
    running = Effective(save(model(TEXT), tmp_path / "m.onnx"), GIVEN)
    running.use("q")
    running.use("v")
    assert relative_error(running.run(X)["y"], truth("v")) <= 3e-6
    assert np.array_equal(running.values["w"].numpy(), running._w["w"].numpy())


GRAPHS = {
    "Gemm, transposed": ("float[N,5]", '["/m/q/Gemm"] y = Gemm<transB=1>(x, w)', "float[7,5] w", (7, 5), "out,in"),
    "a Transpose before it": (
        "float[N,5]",
        '["/m/q/T"] t = Transpose<perm=[1,0]>(w) ["/m/q/MatMul"] y = MatMul(x, t)',
        "float[7,5] w",
        (7, 5),
        "out,in",
    ),
    "a Cast before it": (
        "float[N,5]",
        '["/m/q/C"] t = Cast<to=1>(w) ["/m/q/MatMul"] y = MatMul(x, t)',
        "float16[5,7] w",
        (5, 7),
        "in,out",
    ),
    "Conv": ("float[N,5,6,6]", '["/m/q/Conv"] y = Conv(x, w)', "float[7,5,3,2] w", (7, 5, 3, 2), "out,in,in,in"),
    "Gather": ("int64[N,4]", '["/m/q/Gather"] y = Gather(w, x)', "float[9,5] w", (9, 5), "in,out"),
    "16 bits": ("float16[N,5]", '["/m/q/MatMul"] y = MatMul(x, w)', "float16[5,7] w", (5, 7), "in,out"),
}


@pytest.mark.parametrize("what", GRAPHS)
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "replace", "everything"])
def test_every_operator_reads_what_a_merge_writes(what, kind, tmp_path):
    given, nodes, weight, shape, axes = GRAPHS[what]
    out = "float16" if what == "16 bits" else "float"
    path = save(model(f"g ({given} x) => ({out}[N,K] y) <{weight}> {{ {nodes} }}"), tmp_path / "m.onnx")
    place = Placement.of(shape, axes)
    one = Adapter({"m.q.weight": Update(updates.MATRIX[kind](place), placement=place)})
    running = Effective(path, {"one": one})
    merge(one, open_base(path), tmp_path / "merged.onnx")
    merged = session(tmp_path / "merged.onnx")
    draw = np.random.default_rng(3)
    sizes = [3 if isinstance(n, str) else n for n in merged.get_inputs()[0].shape]
    x = (
        draw.integers(0, 9, sizes)
        if what == "Gather"
        else draw.standard_normal(sizes).astype(given.split("[")[0] + "32" * (given[5] == "["))
    )
    before = running.run({"x": x})["y"]  # ONNX Runtime lays constant kernels otherwise, and adds in another order
    assert relative_error(before, session(path).run(None, {"x": x})[0]) <= (1e-3 if what == "16 bits" else 1e-6)
    running.use("one")
    error = relative_error(running.run({"x": x})["y"], merged.run(None, {"x": x})[0])
    assert error <= (2e-3 if what in ("16 bits", "a Cast before it") else 3e-6)
    running.use(None)
    assert np.array_equal(running.run({"x": x})["y"], before)


def test_weights_in_a_data_file_are_read_from_there(truth, tmp_path):  # noqa: F811
    needs("data of a model in memory")
    onnx.save(model(TEXT), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    running = Effective(tmp_path / "m.onnx", {"q": GIVEN["q"]})  # v and b stay in the file
    running.use("q")
    assert relative_error(running.run(X)["y"], truth("q")) <= 3e-6


def test_after_a_failure_w_is_back(truth, monkeypatch, tmp_path):  # noqa: F811
    running = Effective(save(model(TEXT), tmp_path / "m.onnx"), GIVEN)
    running.use("q")
    made, fails = Effective._make, []

    def failing(self, seat, updates):
        if fails:
            raise LoraFormatError([])
        fails.append(seat)
        made(self, seat, updates)

    monkeypatch.setattr(Effective, "_make", failing)
    with pytest.raises(LoraFormatError):
        running.use("both")
    monkeypatch.setattr(Effective, "_make", made)
    assert np.array_equal(running.run(X)["y"], truth(None))
    running.use("both")
    assert relative_error(running.run(X)["y"], truth("both")) <= 3e-6


def test_threads_see_whole_weights(truth, tmp_path):  # noqa: F811
    running = Effective(save(model(TEXT), tmp_path / "m.onnx"), GIVEN)
    wanted = [truth(choice) for choice in CHOICES]

    def one(n):
        running.use(CHOICES[n % len(CHOICES)])
        found = running.run(X)["y"]
        return min(relative_error(found, y) for y in wanted)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(one, range(200))) <= 3e-6


SHARED = """g (float[N,5] x) => (float[N,7] y, float[N,7] z) <float[5,7] w>
  { ["/m/q/MatMul"] y = MatMul(x, w)  a = Abs(w)  ["/m/other/MatMul"] z = MatMul(x, a) }"""
INNER = """g (bool c, float[N,5] x) => (float[N,7] y) { y = If(c) <
    then_branch = t () => (float[N,7] a) <float[5,7] w = {%s}> { ["/m/q/MatMul"] a = MatMul(x, w) },
    else_branch = e () => (float[N,7] b) { s = Constant<value = float[5,7] {%s}>() b = MatMul(x, s) } > }"""
VALUES = ", ".join(f"{n}.5" for n in range(35))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SHARED, "LF-608  Abs depends on its weight too  @ m.q.weight"),
        (INNER % (VALUES, VALUES), "LF-608  its weight is in an inner graph"),
    ],
)
def test_a_weight_that_cannot_be_an_input_is_refused(text, says, tmp_path):
    with pytest.raises(LoraFormatError) as told:
        Effective(save(model(text), tmp_path / "m.onnx"), {"one": adapter({"m.q.weight": (7, 5)})})
    assert says in str(told.value)


def test_what_does_not_fit_is_refused(tmp_path):
    path = save(model(TEXT), tmp_path / "m.onnx")
    with pytest.raises(LoraFormatError, match="LF-602"):
        Effective(path, {"one": adapter({"m.nowhere.weight": (7, 5)})})
    with pytest.raises(LoraFormatError, match="LF-701"):
        Effective(tmp_path / "none.onnx", {})
    running = Effective(path, GIVEN)
    for choice, says in (("z", "LF-705  no adapter is called z"), ({"q": np.inf}, "LF-705  weights must be finite")):
        with pytest.raises(LoraFormatError, match=says):
            running.use(choice)


MUTANTS = {
    "W is what acts already": lambda p: p.setattr(Effective, "_make", _on_top),
    "W does not come back": lambda p: p.setattr(effective.Adding, "copy", lambda self, w, out: None),
    "L and R are those of another reading": lambda p: p.setattr(effective, "_factors", _turned),
    "the scale is lost": lambda p: p.setattr(effective, "_factors", _unscaled),
}
_FACTORS, _MAKE = effective._factors, Effective._make


def _on_top(self, seat, updates):
    self._w[seat.name] = self.values[seat.name]
    _MAKE(self, seat, updates)


def _turned(update, place):
    left, right = _FACTORS(update, place)
    return np.ascontiguousarray(left[::-1]), right


def _unscaled(update, place):
    left, right = _FACTORS(update, place)
    return left / np.float32(update["lora"].scale), right


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_red(mutant, truth, monkeypatch, tmp_path):  # noqa: F811
    MUTANTS[mutant](monkeypatch)
    running = Effective(
        save(model(TEXT), tmp_path / "m.onnx"), {"q": adapter({"m.q.weight": lora(7, 5, rank=3, seed=11)})}
    )
    errors = []
    for choice in ("q", {"q": 0.5}, None):
        running.use(choice)
        errors.append(relative_error(running.run(X)["y"], truth(choice)))
    assert max(errors) > 1e-3
