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
from bench.measure import command, interleave, row
from loraformat.adapter import Adapter
from loraformat.parts import Lora
from loraformat.updates import Update

LAYERS, WIDTH, RANK = 40, 4096, 16


def make_model(folder: Path) -> Path:
    """A chain of Linear layers whose weights lie in one data file."""
    size = WIDTH * WIDTH * 4
    weight = np.random.default_rng(1).standard_normal(WIDTH * WIDTH).astype(np.float32).tobytes()
    with open(folder / "model.data", "wb") as data:
        data.writelines(weight for _ in range(LAYERS))
    nodes, weights, x = [], [], "x"
    for i in range(LAYERS):
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


def make_adapter(path: Path) -> Path:
    draw = np.random.default_rng(0)
    factors = [draw.standard_normal((RANK, WIDTH)).astype(np.float32) for _ in range(2)]
    update = Update((Lora(factors[0], np.ascontiguousarray(factors[1].T), 32, "alpha/r"),))
    lf.save(Adapter({f"layers.{i}.proj.weight": update for i in range(LAYERS)}), path)
    return path


def make(folder: Path) -> None:
    """Model and adapter; in a process of its own, whose memory no measured one inherits (ru_maxrss)."""
    make_model(folder)
    make_adapter(folder / "a.safetensors")


def main(runs: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, adapter, out = folder / "model.onnx", folder / "a.safetensors", folder / "out.onnx"
        python, tool = sys.executable, str(Path(sys.executable).with_name("loraformat"))
        command(python, "-m", "bench.attach", name)()
        saved = f"{str(folder / 'peer.onnx')!r}, save_as_external_data=True, location='peer.data'"
        peer = f"import onnx; onnx.save_model(onnx.load({str(model)!r}), {saved})"
        clean = f"import pathlib; [p.unlink() for n in ('peer.*', 'cp.*', 'merged*') for p in pathlib.Path({name!r}).glob(n)]"
        copied, merged = folder / "cp.data", folder / "merged.onnx"
        copy = f"cp {folder / 'model.data'} {copied} && sync {copied}"
        timings = interleave(
            {
                "clean": command(python, "-c", clean),  # onnx appends to a data file that exists
                "import": command(python, "-c", "import onnx"),
                "attach": command(tool, "attach", str(adapter), "--to", str(model), "-o", str(out), "--force"),
                "cp": command("/bin/sh", "-c", copy),
                "merge": command(tool, "merge", str(adapter), "--into", str(model), "-o", str(merged), "--force"),
                "peer": command(python, "-c", peer),
            },
            runs,
        )
        grown = out.stat().st_size - model.stat().st_size
        onnx.checker.check_model(str(out))
    print(row("import onnx", timings["import"], timings["import"], "the limit"))
    print(row("loraformat attach", timings["attach"], timings["import"], "budget ≤ import + 1 s, ≤ 250 MiB"))
    print(row("cp and sync", timings["cp"], timings["cp"], "the limit"))
    print(row("loraformat merge", timings["merge"], timings["cp"], "budget ≤ 2.0 × cp, ≤ 400 MiB"))
    print(row("onnx.load + onnx.save", timings["peer"], timings["cp"], "peer"))
    held = 2 * LAYERS * RANK * WIDTH * 4
    print(f"attach wrote {grown / 1e6:.1f} MB more than the graph; the adapter holds {held / 1e6:.1f} MB")


if __name__ == "__main__":
    make(Path(sys.argv[1])) if sys.argv[1:] else main()
