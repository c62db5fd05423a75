"""Attach to, and merge into, a model with 2.7 GB of external data: attach writes only the adapter, merge reads once.

Limits: the import of onnx in the same run; for merge, cp of the data file with its fsync. Peer: onnx.load and onnx.save
of the whole model, as tools do it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

import loraformat as lf
from bench.chart import time_and_memory
from bench.measure import Timing, command, interleave, row
from loraformat.adapter import Adapter
from loraformat.parts import Lora
from loraformat.updates import Update

LAYERS, WIDTH, RANK = (10, 20, 40), 4096, 16


def make_model(folder: Path, layers: int) -> Path:
    """A chain of Linear layers whose weights lie in one data file."""
    size = WIDTH * WIDTH * 4
    weight = np.random.default_rng(1).standard_normal(WIDTH * WIDTH).astype(np.float32).tobytes()
    with open(folder / "model.data", "wb") as data:
        data.writelines(weight for _ in range(layers))
    nodes, weights, x = [], [], "x"
    for i in range(layers):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.data"), ("offset", i * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"y{i}"], f"/layers.{i}/proj/MatMul"))
        x = f"y{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def make_adapter(path: Path, layers: int) -> Path:
    draw = np.random.default_rng(0)
    factors = [draw.standard_normal((RANK, WIDTH)).astype(np.float32) for _ in range(2)]
    update = Update((Lora(factors[0], np.ascontiguousarray(factors[1].T), 32, "alpha/r"),))
    lf.save(Adapter({f"layers.{i}.proj.weight": update for i in range(layers)}), path)
    return path


def make(folder: Path, layers: int) -> None:
    """Model and adapter; in a process of its own, whose memory no measured one inherits (ru_maxrss)."""
    make_model(folder, layers)
    make_adapter(folder / "a.safetensors", layers)


def measure(folder: Path, layers: int, runs: int) -> dict[str, Timing]:
    """Everything at one size; what attach wrote beyond the adapter is printed."""
    model, adapter, out = folder / "model.onnx", folder / "a.safetensors", folder / "out.onnx"
    python, tool = sys.executable, str(Path(sys.executable).with_name("loraformat"))
    command(python, "-m", "bench.attach", str(folder), str(layers))()
    saved = f"{str(folder / 'peer.onnx')!r}, save_as_external_data=True, location='peer.data'"
    peer = f"import onnx; onnx.save_model(onnx.load({str(model)!r}), {saved})"
    stale = f"for n in ('peer.*', 'cp.*', 'merged*') for p in pathlib.Path({str(folder)!r}).glob(n)"
    copied, merged = folder / "cp.data", folder / "merged.onnx"
    copy = f"cp {folder / 'model.data'} {copied} && sync {copied}"
    timings = interleave(
        {
            "clean": command(python, "-c", f"import pathlib; [p.unlink() {stale}]"),  # onnx appends to what exists
            "import": command(python, "-c", "import onnx"),
            "attach": command(tool, "attach", str(adapter), "--to", str(model), "-o", str(out), "--force"),
            "cp": command("/bin/sh", "-c", copy),
            "merge": command(tool, "merge", str(adapter), "--into", str(model), "-o", str(merged), "--force"),
            "peer": command(python, "-c", peer),
        },
        runs,
    )
    onnx.checker.check_model(str(out))
    grown, held = out.stat().st_size - model.stat().st_size, 2 * layers * RANK * WIDTH * 4
    print(f"attach wrote {grown / 1e6:.1f} MB more than the graph; the adapter holds {held / 1e6:.1f} MB")
    return timings


def main(runs: int = 3) -> None:
    names = {
        "cp": "cp and sync",
        "attach": "loraformat attach",
        "merge": "loraformat merge",
        "peer": "onnx.load + save",
    }
    series: dict[str, dict[float, Timing]] = {label: {} for label in names.values()}
    for layers in LAYERS:
        size = layers * WIDTH * WIDTH * 4 / 1e9
        with tempfile.TemporaryDirectory() as name:
            timings = measure(Path(name), layers, runs)
        print(row(f"import onnx ({size:.1f} GB)", timings["import"], timings["import"], "the limit"))
        print(row(names["attach"], timings["attach"], timings["import"], "budget ≤ import + 1 s, ≤ 250 MiB"))
        print(row(names["cp"], timings["cp"], timings["cp"], "the limit"))
        print(row(names["merge"], timings["merge"], timings["cp"], "budget ≤ 2.0 × cp, ≤ 400 MiB"))
        print(row(names["peer"], timings["peer"], timings["cp"], "peer"))
        for key, label in names.items():
            series[label][size] = timings[key]
    time_and_memory("attach", "ONNX model with external data, GB", series, (names["cp"],))


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2])) if sys.argv[1:] else main()
