"""The service example: clients that come together, each with an adapter of its own, are answered as if they were alone."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
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


def example(name):
    """A module of the example."""
    pytest.importorskip("starlette", reason="needs the peers: starlette, uvicorn")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "service"))
    try:
        return importlib.import_module(name)
    finally:
        del sys.path[0]


@contextlib.contextmanager
def serving(running):
    """(its address, its state, the server)."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the peers: starlette, uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = example("app").application(running)
    server = uvicorn.Server(uvicorn.Config(made, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", made.state, server
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def served(stacked):
    """(its address, its state)."""
    with serving(stacked) as (address, state, _):
        yield address, state


def status(address, body):
    """What a request is answered with."""
    try:
        post(address, body)
        return 200
    except urllib.error.HTTPError as error:
        return error.code


def sent(address, data, more=0):
    """A connection on which a request has come, but for its last bytes."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /run HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data) + more}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


GOOD = {"adapter": "a", "inputs": {"x": [[0.5] * 5], "ids": [1]}}


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
    good = GOOD
    wrong = [
        b"{",
        b"[" * 100_000,
        {**good, "inputs": {"x": [[0.0] * 5], "ids": [1.9]}},
        {**good, "inputs": {"x": [[0.0] * 5], "ids": [2**63]}},
        {**good, "inputs": {"x": [[0.0] * 5], "ids": ["1"]}},
        {**good, "inputs": {"x": [[1e39] * 5], "ids": [1]}},
        {**good, "inputs": {"x": [[float("nan")] * 5], "ids": [1]}},
        {**good, "inputs": {"x": [["0.5"] * 5], "ids": [1]}},
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


def test_an_output_without_rows_is_a_mistake_and_not_the_end(tmp_path):
    text = "g (float[N,5] x) => (float[N,7] y, float s) <float[5,7] w> { ['/m/q/MatMul'] y = MatMul(x, w)  s = ReduceSum<keepdims=0>(y) }"
    base = open_base(save(model(text.replace("'", '"')), tmp_path / "base.onnx"))
    options = Options(tmp_path / "stack.onnx", "stack", rows=("x",))
    base.apply(prepare("attach", [("a", adapter({"m.q.weight": (7, 5)}))], base, options))
    with serving(Session(tmp_path / "stack.onnx")) as (address, _, _):
        assert [status(address, {"inputs": {"x": [0.0] * 5}}) for _ in range(2)] == [400, 400]


def test_a_body_without_end_is_not_read_to_its_end(served):
    address, _ = served
    with sent(address, b" " * (9 << 20), more=1 << 40) as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_nobody_waits_for_a_slow_client(served, monkeypatch):
    address, _ = served
    monkeypatch.setattr(example("app"), "MOST_SECONDS", 1.0)
    with sent(address, b'{"adapter"', more=99) as connection:
        assert status(address, GOOD) == 200
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_who_hangs_up_is_not_computed_for(served, monkeypatch):
    address, state = served
    monkeypatch.setattr(state.batches, "wait", 0.5)
    before = state.batches.runs
    sent(address, json.dumps(GOOD).encode()).close()
    time.sleep(1)
    assert state.batches.runs == before
    assert status(address, GOOD) == 200


def test_no_more_wait_than_may(stacked):
    batches = example("batches")

    async def asked():
        made = batches.Batches(stacked, wait=0.2, waiting=2)
        row = {
            name: np.zeros(shape, kind) for name, shape, kind in (("x", (1, 5), np.float32), ("ids", (1,), np.int64))
        }
        work = asyncio.create_task(made.work())
        found = await asyncio.gather(*(made.row("a", row) for _ in range(5)), return_exceptions=True)
        work.cancel()
        return found

    found = asyncio.run(asked())
    assert [type(one).__name__ for one in found] == ["dict"] * 2 + ["BusyError"] * 3


def test_what_has_come_is_answered_before_the_end(stacked):
    with serving(stacked) as (address, state, server):
        state.batches.wait = 0.5
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(status, address, GOOD) for _ in range(8)]
            time.sleep(0.2)
            server.should_exit = True
            assert [one.result() for one in asked] == [200] * 8


def test_a_model_that_is_no_stack_is_not_served(tmp_path):
    batches = example("batches")
    with pytest.raises(ValueError, match="stack"):
        batches.Batches(Session(save(model(TEXT), tmp_path / "base.onnx")))


def test_rows_with_the_adapter_of_another_client_are_red(served, stacked, monkeypatch):
    whole = stacked.use
    monkeypatch.setattr(stacked, "use", lambda choice: whole(choice[::-1]))
    with pytest.raises(AssertionError):
        test_every_client_has_the_row_of_its_own_adapter(served, stacked)
