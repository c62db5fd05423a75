"""OpenVINO runs what attach writes: stock operators alone, and the outputs of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import adapter, lora, model, save, session

from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx import tort

pytestmark = pytest.mark.peer

TEXT = """g (float[N,5,8] x, int64[N,6] ids) => (float[N,6,4] y)
  <float[9,7] e, float[7,5,3] c, float[7] d, float[7,6] w, float[6] b, float[6,4] v>
  { ["/e/Gather"] t = Gather(e, ids)  ["/c/Conv"] f = Conv(x, c, d)  u = Transpose <perm = [0, 2, 1]> (f)
    s = Add(t, u)  ["/q/MatMul"] h = MatMul(s, w)  g = Add(h, b)  r = Relu(g)  ["/v/MatMul"] y = MatMul(r, v) }"""
KEYS = {"e.weight": (7, 9), "c.weight": (7, 15), "q.weight": (6, 7), "v.weight": (4, 6)}
X = {
    "x": np.random.default_rng(5).standard_normal((3, 5, 8)).astype(np.float32),
    "ids": np.random.default_rng(6).integers(0, 9, (3, 6)),
}
GIVEN = {n: adapter({k: lora(*s, rank=i + 2, seed=i) for k, s in KEYS.items()}) for i, n in enumerate("ab")}
OPTIONS = {
    "branch": {},
    "branch, folded": {"topology": "folded"},
    "branch, concat": {"topology": "concat"},
    "branch, prefolded": {"prefold": True},
    # OpenVINO 2026.4 takes no kernel whose size is open
    "swap, padded": {"mode": "swap", "slots": "required", "pad_rank": 4},
    "stack": {"mode": "stack", "rows": ("x", "ids")},
    "stack for CUDA": {"mode": "stack", "rows": ("x", "ids"), "provider": "cuda"},
    "stack of weights": {"mode": "stack", "rows": ("x", "ids"), "select": "weights"},
}


def runner(path):
    openvino = pytest.importorskip("openvino", reason="needs the peer openvino")
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled = core.compile_model(core.read_model(str(path)), "CPU")
    return lambda feeds: compiled(dict(feeds))[0]


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    """The base, and each adapter alone."""
    folder = tmp_path_factory.mktemp("truth")
    base = open_base(save(model(TEXT), folder / "base.onnx"))
    found = {None: session(base.path).run(None, X)[0]}
    for name, one in GIVEN.items():
        merge(one, base, folder / f"{name}.onnx")
        found[name] = session(folder / f"{name}.onnx").run(None, X)[0]
        assert relative_error(runner(folder / f"{name}.onnx")(X), found[name]) <= 1e-5
    return base, found


def fed(case, choice, out):
    """What the model is fed so that an adapter, or none, acts."""
    number = 0 if choice is None else "ab".index(choice) + 1
    if case == "stack of weights":
        return {"lora.weights": np.eye(3, 2, -1, dtype=np.float32)[[number] * 3]}
    if case.startswith("stack"):
        return {"lora.index": np.full(3, number)}
    tensors = tort.read(out.with_suffix(f".{choice or 'a'}.onnx_adapter")).tensors
    return {n: np.zeros_like(t) for n, t in tensors.items()} if choice is None else dict(tensors)


@pytest.mark.parametrize("case", OPTIONS)
def test_it_gives_the_outputs_of_onnx_runtime(case, truths, tmp_path):
    base, truth = truths
    out, one = tmp_path / "out.onnx", case.startswith("branch")
    adapters = list(GIVEN.items())[: 1 if one else 2]
    base.apply(prepare("attach", adapters, base, Options(out, **OPTIONS[case])))
    run = runner(out)
    for choice in ("a",) if one else ("a", None, "b", "a"):
        found = run(X if one else {**X, **fed(case, choice, out)})
        assert relative_error(found, truth[choice]) <= 1e-5, choice
    assert relative_error(truth["a"], truth[None]) > 0.1
