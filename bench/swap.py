"""What a change of adapters costs: the first run after it, less a run of the same adapter again.

Many small targets (224, so 448 inputs), where dispatch is all there is: python bench/swap.py; for CUDA with
onnxruntime-gpu --provider cuda, and --captured for CUDA graphs. Runs are interleaved in one process: again, then another
adapter, by turns. Two adapters that lie on the device (resident), one that was just loaded, and, as the peer, ONNX
Runtime's own LoraAdapter. Loading an adapter leaves the processor's cache without the model, and its threads asleep: what
that alone costs is seen in a run of the same adapter as before, after another was loaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

sys.path.insert(0, str(Path(__file__).parent.parent))

from loraformat import Adapter, Lora, Update, open_base
from loraformat.base import Options
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx.runtime import Session


def write_model(path: Path, targets: int, width: int, dtype: str) -> None:
    """A chain of products."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    draw, nodes, tensors, x = np.random.default_rng(1), [], [], "x"
    for i in range(targets):
        values = (draw.standard_normal((width, width)) / width**0.5).astype(dtype)
        tensors.append(onnx.numpy_helper.from_array(values, f"l{i}.w"))
        nodes.append(helper.make_node("MatMul", [x, f"l{i}.w"], [f"h{i}"], f"/l{i}/MatMul"))
        x = f"h{i}"
    ends = [helper.make_tensor_value_info(name, kind, ["rows", width]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def adapter(targets: int, width: int, rank: int, seed: int, dtype: str) -> Adapter:
    """A pair for each."""
    draw = np.random.default_rng(seed)
    pairs = (
        (draw.standard_normal((rank, width)) * 0.02, draw.standard_normal((width, rank)) * 0.02) for _ in range(targets)
    )
    return Adapter(
        {
            f"l{i}.weight": Update((Lora(a.astype(dtype), b.astype(dtype), 1.0, "factor"),))
            for i, (a, b) in enumerate(pairs)
        }
    )


def main() -> None:
    """Milliseconds, medians, with the 10th and the 90th percentile."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--captured", action="store_true")
    asked.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    asked.add_argument("--targets", type=int, default=224)
    asked.add_argument("--width", type=int, default=64)
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--turns", type=int, default=200)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "base.onnx", given.targets, given.width, given.dtype)
        made = [(n, adapter(given.targets, given.width, given.rank, seed, given.dtype)) for seed, n in enumerate("abc")]
        base, out = open_base(folder / "base.onnx"), folder / "swap.onnx"
        pad = given.rank if given.captured else None
        base.apply(prepare("attach", made[:1], base, Options(out, "swap", pad_rank=pad)))
        providers = ["CUDAExecutionProvider"] if given.provider == "cuda" else ["CPUExecutionProvider"]
        session = Session(out, providers, captured=given.captured)
        if session.inference.get_providers()[0] != providers[0]:
            raise SystemExit(f"this onnxruntime has no {providers[0]}: install onnxruntime-gpu")
        report(session, made, given)


def report(session: Session, made: list[tuple[str, Adapter]], given: argparse.Namespace) -> None:
    x = {"x": np.ones((1, given.width), given.dtype)}
    for name, one in made:
        session.load(name, one)
        session.use(name).run(x)

    lora = None
    if not given.captured:
        held, lora = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        held.Load(str(session.path.with_name("swap.a.onnx_adapter")))
        lora.add_active_adapter(held)

    def taken(name: str | None) -> float:
        begin = time.perf_counter()
        session.use(name).run(x)
        return time.perf_counter() - begin

    times: dict[str, list[float]] = {
        what: []
        for what in (
            "the base", "again", "another, resident", "again, after a load", "another, just loaded", "by LoraAdapter",
        )
    }  # fmt: skip
    for turn in range(given.turns):
        taken(None)
        times["the base"].append(taken(None))
        taken("ab"[turn % 2])
        times["again"].append(taken("ab"[turn % 2]))
        times["another, resident"].append(taken("ab"[1 - turn % 2]))
        session.load("c", made[2][1])
        times["again, after a load"].append(taken("ab"[1 - turn % 2]))
        session.load("c", made[2][1])
        times["another, just loaded"].append(taken("c"))
        if lora is not None:
            begin = time.perf_counter()
            session.inference.run(None, x, lora)
            times["by LoraAdapter"].append(time.perf_counter() - begin)
    steady = float(np.median(times["again"]))
    where = f"{given.provider}{', captured' if given.captured else ''}, {given.dtype}"
    print(f"{where}: {given.targets} targets of {given.width} × {given.width}, rank {given.rank}, {given.turns} turns")
    for what, each in ((what, each) for what, each in times.items() if each):
        low, middle, high = np.quantile(each, [0.1, 0.5, 0.9]) * 1e3
        print(
            f"{what:22} {middle:8.3f} ms ({low:.3f}–{high:.3f})   {middle - steady * 1e3:+7.3f} ms   {middle / steady / 1e3:5.2f} ×"
        )


if __name__ == "__main__":
    main()
