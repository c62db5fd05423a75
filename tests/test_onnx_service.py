"""The service example: clients that come together, each with an adapter of its own, are answered as if they were alone."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from graphs import adapter, lora, model, save

from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx.runtime import Session

pytestmark = pytest.mark.peer

TEXT = """g (float[N,T,5] x, int64[N,T] ids) => (float[N,T,4] y) <float[5,7] w, float[7,4] v, float[9,5] e>
  { ["/e/Gather"] t = Gather(e, ids)  s = Add(x, t)  ["/m/q/MatMul"] h = MatMul(s, w)  ["/m/v/MatMul"] y = MatMul(h, v) }"""
NAMES = (None, "a", "b", "c")


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    base = open_base(save(model(TEXT), folder / "base.onnx"))
    sizes = {"m.q.weight": (7, 5), "m.v.weight": (4, 7), "e.weight": (5, 9)}
    given = [(n, adapter({k: lora(*s, rank=i + 1, seed=i) for k, s in sizes.items()})) for i, n in enumerate("abc")]
    options = Options(folder / "stack.onnx", "stack", rows=("x", "ids"))
    base.apply(prepare("attach", given, base, options))
    return Session(folder / "stack.onnx")


@pytest.fixture(scope="module")
def served(stacked):
    """(its address, its state)."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the peers: starlette, uvicorn")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "service"))
    try:
        import app
    finally:
        del sys.path[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = app.application(stacked)
    server = uvicorn.Server(uvicorn.Config(made, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", made.state
    server.should_exit = True
    thread.join()


def post(address, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{address}/run", data), timeout=30) as answer:
        return json.load(answer)["outputs"]


def rows(count, tokens):
    draw = np.random.default_rng(count)
    return [
        (NAMES[i % 4], {"x": draw.standard_normal((tokens, 5)).astype(np.float32), "ids": draw.integers(0, 9, tokens)})
        for i in range(count)
    ]


def test_every_client_has_the_row_of_its_own_adapter(served, stacked):
    address, state = served
    asked = [*rows(24, 3), *rows(24, 2)]
    before = state.batches.runs

    def client(one):
        called, inputs = one
        return post(address, {"adapter": called, "inputs": {name: v.tolist() for name, v in inputs.items()}})

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(client, asked))
    alone = [stacked.use([called]).run({n: v[None] for n, v in inputs.items()})["y"][0] for called, inputs in asked]
    for answer, truth in zip(found, alone, strict=True):
        assert relative_error(np.array(answer["y"]), truth.astype(np.float64)) <= 1e-6
    assert max(relative_error(alone[0], other) for other in alone[4::4]) > 0.1
    assert state.batches.runs - before < len(asked) / 2


def test_a_mistake_is_its_callers_alone(served):
    address, _ = served
    good = {"adapter": "a", "inputs": {"x": [[0.0] * 5], "ids": [1]}}
    wrong = [
        b"{",
        {**good, "adapter": "z"},
        {**good, "inputs": {"x": [[0.0] * 5]}},
        {**good, "inputs": {"x": "u", "ids": [1]}},
        {**good, "inputs": {"z": [1]}},
        {**good, "inputs": {"x": [[0.0] * 4], "ids": [1]}},
        {**good, "inputs": {"x": [[0.0] * 5], "ids": [99]}},
        [1],
    ]

    def client(body):
        try:
            return post(address, body)
        except urllib.error.HTTPError as error:
            return error.code

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(client, [good, *wrong, good]))
    assert found[1:-1] == [400] * len(wrong)
    assert found[0] == found[-1] == client(good) != 400
    with urllib.request.urlopen(f"{address}/adapters", timeout=30) as answer:
        assert json.load(answer) == ["a", "b", "c"]


def test_rows_with_the_adapter_of_another_client_are_red(served, stacked, monkeypatch):
    whole = stacked.use
    monkeypatch.setattr(stacked, "use", lambda choice: whole(choice[::-1]))
    with pytest.raises(AssertionError):
        test_every_client_has_the_row_of_its_own_adapter(served, stacked)
