"""What an adapter costs inside com.microsoft.Attention, which swap and stack take apart: ratios to the same layers without any.

Layers of the sizes of BERT-base, as ONNX Runtime's optimizer leaves them: one weight for q, k and v in the Attention, then
three products; with ``--past`` the tokens stand behind so many, causal, as in GPT-2. An adapter on every product. One row; on
the CPU one thread, with CUDA in float16 and the forms for it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.onnx_modes import Runner, interleaved
from loraformat import Adapter, Lora, Update, open_base
from loraformat.base import Options
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx import tort

HIDDEN, WIDE, HEADS, RANK = 768, 3072, 12, 16
WEIGHTS = {"qkv": (HIDDEN, 3 * HIDDEN), "o": (HIDDEN, HIDDEN), "up": (HIDDEN, WIDE), "down": (WIDE, HIDDEN)}


def write_model(path: Path, layers: int, dtype: str, *, past: bool) -> None:
    """x, a mask of tokens, and with ``past`` what each layer has seen."""
    draw, kind = np.random.default_rng(1), helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, tensors, x = [], [], "x"
    inputs = [("x", kind, ["rows", "tokens", HIDDEN]), ("mask", onnx.TensorProto.INT32, ["rows", "seen"])]
    outputs = [(f"layers.{layers - 1}.out", kind, ["rows", "tokens", HIDDEN])]
    for i in range(layers):
        at = f"layers.{i}"
        for name, (rows, columns) in WEIGHTS.items():
            values = draw.standard_normal((rows, columns), np.float32) * np.float32(0.3 / rows**0.5)
            tensors.append(numpy_helper.from_array(values.astype(dtype), f"{at}.{name}.w"))
        tensors.append(numpy_helper.from_array(draw.standard_normal(3 * HIDDEN).astype(dtype), f"{at}.b"))
        read, made = [x, f"{at}.qkv.w", f"{at}.b", "mask"], [f"{at}.attended"]
        if past:
            read, made = [*read, f"{at}.past"], [*made, f"{at}.present"]
            inputs.append((read[-1], kind, [2, "rows", HEADS, "past", HIDDEN // HEADS]))
            outputs.append((made[-1], kind, [2, "rows", HEADS, "seen", HIDDEN // HEADS]))
        how = {"num_heads": HEADS, "unidirectional": int(past), "domain": "com.microsoft"}
        nodes.append(helper.make_node("Attention", read, made, f"/{at.replace('.', '/')}/qkv/Attention", **how))
        source = made[0]
        for name, (op, operands) in {
            "o": ("Add", [x]),
            "up": ("Relu", []),
            "down": ("Add", [f"{at}.o.y"]),
        }.items():
            product = [source, f"{at}.{name}.w"], [f"{at}.{name}"]
            nodes.append(helper.make_node("MatMul", *product, f"/{at.replace('.', '/')}/{name}/MatMul"))
            source = f"{at}.out" if name == "down" else f"{at}.{name}.y"
            nodes.append(helper.make_node(op, [f"{at}.{name}", *operands], [source]))
        x = source
    infos = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "layers", *infos, tensors)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))


def adapter(layers: int, seed: int, dtype: str) -> Adapter:
    """A pair for every product."""
    draw, targets = np.random.default_rng(seed), {}
    for i in range(layers):
        for name, (rows, columns) in WEIGHTS.items():
            a, b = ((draw.standard_normal(s) * 0.02).astype(dtype) for s in ((RANK, rows), (columns, RANK)))
            targets[f"layers.{i}.{name}.weight"] = Update((Lora(a, b, 1.0, "factor"),))
    return Adapter(targets)


def fed(layers: int, tokens: int, past: int | None, dtype: str) -> dict[str, np.ndarray]:
    """One row."""
    draw = np.random.default_rng(3)
    found = {"x": draw.standard_normal((1, tokens, HIDDEN)).astype(dtype)}
    found["mask"] = np.ones((1, tokens + (past or 0)), np.int32)
    if past is not None:
        seen = draw.standard_normal((2, 1, HEADS, past, HIDDEN // HEADS)).astype(dtype)
        found |= {f"layers.{i}.past": seen for i in range(layers)}
    return found


def main() -> None:
    """A row for each way of attaching."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 128, 512])
    asked.add_argument("--past", type=int, help="how many tokens stand before them")
    asked.add_argument("--layers", type=int, default=2)
    asked.add_argument("--runs", type=int, default=30)
    given = asked.parse_args()
    layers, past, provider = given.layers, given.past, given.provider
    dtype = "float16" if provider == "cuda" else "float32"
    print(f"onnxruntime {onnxruntime.__version__}, {provider}, {layers} layers, {past} tokens before")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "base.onnx", layers, dtype, past=past is not None)
        base, adapters = open_base(folder / "base.onnx"), [(f"a{n}", adapter(layers, n, dtype)) for n in range(8)]
        chosen = {"lora.index": np.ones(1, np.int64)}
        models = {"dense": (base.path, {})}
        for what, mode, count in (("branch", "branch", 1), ("swap", "swap", 1), ("stack of 8", "stack", 8)):
            models[what] = (folder / f"{mode}.onnx", chosen if mode == "stack" else {})
            options = Options(models[what][0], mode, rows=("x",), provider=provider)
            base.apply(prepare("attach", adapters[:count], base, options))
        models["swap, fed"] = (models["swap"][0], dict(tort.read(folder / "swap.a0.onnx_adapter").tensors))
        runners = {what: Runner(path, provider) for what, (path, _) in models.items()}
        for tokens in given.tokens:
            for what, runner in runners.items():
                runner.bind({**fed(layers, tokens, past, dtype), **models[what][1]})
            taken = interleaved(runners, given.runs)
            dense = statistics.median(taken["dense"])
            ratios = {what: statistics.median(times) / dense for what, times in taken.items()}
            print(f"{tokens:5} tokens", f"{dense * 1e3:8.2f} ms", {what: round(n, 2) for what, n in ratios.items()})


if __name__ == "__main__":
    main()
