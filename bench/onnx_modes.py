"""What an adapter costs at run time, by the way in which it is attached: ratios to the same layers without any.

Llama-like layers (q, k, v, o, gate, up, down; no attention between them), an adapter on every weight. For the CUDA
provider: python bench/onnx_modes.py --provider cuda, with onnxruntime-gpu. All variants run interleaved on inputs and
outputs that stay on the device; times are of the wall, medians. A ratio is to the dense graph of the same call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

sys.path.insert(0, str(Path(__file__).parent.parent))

from loraformat import Adapter, Lora, Update, open_base
from loraformat.base import Options
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx import tort


@dataclass(frozen=True)
class Sizes:
    """One model: ``hidden`` and ``wide`` are the widths, ``small`` that of keys and values."""

    layers: int
    hidden: int
    wide: int
    small: int
    rank: int

    def weights(self) -> dict[str, tuple[int, int]]:
        """Name → (in, out)."""
        d, f, s = self.hidden, self.wide, self.small
        one = {"q": (d, d), "k": (d, s), "v": (d, s), "o": (d, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        return {f"layers.{i}.{name}": shape for i in range(self.layers) for name, shape in one.items()}


PACKED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
BLOCK = 32  # values of a column that share a scale in 4 bits


def write_model(path: Path, sizes: Sizes, dtype: str, *, packed: bool = False, int4: bool = False) -> None:
    """The layers: a residual stream that each projection reads and writes, all weights in one data file.

    Args:
        packed: q, k and v in one product, and gate and up.
        int4: weights in 4 bits with a scale for each block (MatMulNBits), as ONNX Runtime's quantiser writes them.
    """
    kind, draw = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), np.random.default_rng(1)
    numpy = helper.tensor_dtype_to_np_dtype(kind)
    nodes, tensors, x = [], [], "x"
    shapes = sizes.weights()

    def product(name: str, source: str, *parts: str) -> str:
        """x · W; of several ``parts`` side by side where they are given."""
        node, widths = f"/{name.replace('.', '/')}/MatMul", [shapes[part][1] for part in parts or (name,)]
        rows, columns = shapes[(parts or (name,))[0]][0], sum(widths)
        if not int4:
            drawn = [draw.standard_normal((rows, n), np.float32) * np.float32(0.3 / rows**0.5) for n in widths]
            tensors.append(onnx.numpy_helper.from_array(np.concatenate(drawn, 1).astype(numpy), f"{name}.w"))
            nodes.append(helper.make_node("MatMul", [source, f"{name}.w"], [name], node))
            return name
        codes = draw.integers(0, 256, (columns, rows // BLOCK, BLOCK // 2), np.uint8)
        scales = np.full(columns * rows // BLOCK, 0.07 / rows**0.5, numpy)
        tensors.append(onnx.numpy_helper.from_array(codes, f"{name}.w_Q4"))
        tensors.append(onnx.numpy_helper.from_array(scales, f"{name}.w_scales"))
        how = {"K": rows, "N": columns, "bits": 4, "block_size": BLOCK, "domain": "com.microsoft"}
        inputs = [source, f"{name}.w_Q4", f"{name}.w_scales"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [name], f"{node}_Q4", **how))
        return name

    def products(layer: int, group: str, source: str) -> list[str]:
        names = [f"layers.{layer}.{name}" for name in PACKED[group]]
        if not packed:
            return [product(name, source) for name in names]
        whole, ends = f"layers.{layer}.{group}", f"l{layer}.{group}.ends"
        tensors.append(onnx.numpy_helper.from_array(np.array([shapes[name][1] for name in names], np.int64), ends))
        nodes.append(helper.make_node("Split", [product(whole, source, *names), ends], names, axis=-1))
        return names

    def node(op: str, inputs: list[str], output: str) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output))
        return output

    for i in range(sizes.layers):
        q, k, v = products(i, "qkv", x)
        joined = node("Concat", [k, v] * (sizes.hidden // (2 * sizes.small)), f"l{i}.kv")
        nodes[-1].attribute.append(helper.make_attribute("axis", -1))
        y = node("Add", [x, product(f"layers.{i}.o", node("Mul", [q, joined], f"l{i}.qkv"))], f"l{i}.mid")
        gate, up = products(i, "gate_up", y)
        wide = node("Mul", [node("Sigmoid", [gate], f"l{i}.gated"), up], f"l{i}.wide")
        x = node("Add", [y, product(f"layers.{i}.down", wide)], f"l{i}.out")
    ends = [helper.make_tensor_value_info(name, kind, ["rows", "tokens", sizes.hidden]) for name in ("x", x)]
    between = [helper.make_tensor_value_info(n, kind, ["rows", "tokens", shapes[n][1]]) for n in shapes if int4]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], tensors, value_info=between)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    onnx.save_model(model, str(path), save_as_external_data=True, location="base.data", size_threshold=1024)


Bound = Mapping[str, Mapping[str, Any]]
"""Key → what of an update says which weight is meant, whatever the model calls it."""


def adapter(sizes: Sizes, seed: int, dtype: str, bound: Bound | None = None) -> Adapter:
    """A pair for every weight."""
    draw, targets = np.random.default_rng(seed), {}
    for name, (rows, columns) in sizes.weights().items():
        a, b = draw.standard_normal((sizes.rank, rows)), draw.standard_normal((columns, sizes.rank))
        kind = np.float16 if dtype == "float16" else np.float32
        pair, key = Lora((a * 0.02).astype(kind), (b * 0.02).astype(kind), 1.0, "factor"), f"{name}.weight"
        targets[key] = Update((pair,), **(bound[key] if bound else {}))
    return Adapter(targets)


Fed = Callable[[int, int], dict[str, np.ndarray]]
"""(rows, tokens) → what is fed besides x."""


FORMS = {"cpu": "gathered", "cuda": "widened (K-concatenation)"}
"""Provider → how the stack for it chooses."""


def variants(
    folder: Path,
    sizes: Sizes,
    dtype: str,
    counts: list[int],
    bound: Bound | None = None,
    forms: Mapping[str, str] = FORMS,
) -> dict[str, tuple[Path, Fed]]:
    """Name → (model, what it is fed)."""
    base = open_base(folder / "base.onnx")
    adapters = [(f"a{n}", adapter(sizes, n, dtype, bound)) for n in range(max(counts))]

    def made(name: str, given: list[tuple[str, Adapter]], mode: str, **options: object) -> Path:
        out = folder / f"{name}.onnx"
        base.apply(prepare("attach", given, base, Options(out, mode, **options)))  # type: ignore[arg-type]
        return out

    def nothing(rows: int, tokens: int) -> dict[str, np.ndarray]:
        return {}

    def indexed(count: int) -> Fed:
        return lambda rows, tokens: {"lora.index": np.arange(rows, dtype=np.int64) % count + 1}

    found: dict[str, tuple[Path, Fed]] = {"dense": (base.path, nothing)}
    for topology in ("separate", "concat", "folded"):
        path = made(f"branch-{topology}", adapters[:1], "branch", topology=topology)
        found[f"branch, {topology}"] = (path, nothing)
    swap = made("swap", adapters[:1], "swap")
    tensors = dict(tort.read(folder / "swap.a0.onnx_adapter").tensors)
    found |= {"swap, off": (swap, nothing), "swap, on": (swap, lambda rows, tokens: tensors)}
    for count in counts:
        for provider, what in forms.items():
            path = made(f"stack-{provider}-{count}", adapters[:count], "stack", rows=("x",), provider=provider)
            found[f"stack of {count}, {what}"] = (path, indexed(count))
    return found


class Runner:
    """A session with everything it reads and writes on the device."""

    def __init__(self, path: Path, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if device == "cpu":
            options.intra_op_num_threads = 1
        name = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        self.device, self.session = device, onnxruntime.InferenceSession(str(path), options, providers=[name])
        if self.session.get_providers()[0] != name:
            raise SystemExit(f"this onnxruntime has no {name}: install onnxruntime-gpu")

    def bind(self, feeds: dict[str, np.ndarray]) -> None:
        self.binding = self.session.io_binding()
        for name, values in feeds.items():
            held = tort.value(onnxruntime.OrtValue, np.ascontiguousarray(values), self.device)
            self.binding.bind_ortvalue_input(name, held)
        self.binding.bind_output(self.session.get_outputs()[0].name, self.device)

    def seconds(self) -> float:
        begin = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return time.perf_counter() - begin


def interleaved(runners: Mapping[str, Runner], count: int) -> dict[str, list[float]]:
    """Seconds of ``count`` runs of each, one after the other, behind three that are not counted."""
    taken: dict[str, list[float]] = {what: [] for what in runners}
    for turn in range(count + 3):
        for what, runner in runners.items():
            seconds = runner.seconds()
            if turn > 2:
                taken[what].append(seconds)
    return taken


def main() -> None:
    """A row for each variant, a column for each number of tokens."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float16"])
    asked.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 128])
    asked.add_argument("--rows", type=int, default=1, help="the batch; tokens are of each row")
    asked.add_argument("--stacks", nargs="+", type=int, default=[1, 8])
    asked.add_argument(
        "--sizes",
        nargs=5,
        type=int,
        default=[2, 1024, 2816, 256, 16],
        metavar="N",
        help="layers, hidden, wide, small, rank",
    )
    asked.add_argument("--runs", type=int, default=30)
    given = asked.parse_args()
    sizes = Sizes(*given.sizes)
    print(f"onnxruntime {onnxruntime.__version__}, {given.provider}, {sizes}, {given.rows} rows")
    for dtype in given.dtypes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder / "base.onnx", sizes, dtype)
            models = variants(folder, sizes, dtype, given.stacks)
            runners = {what: Runner(path, given.provider) for what, (path, _) in models.items()}
            for tokens in given.tokens:
                x = np.random.default_rng(3).standard_normal((given.rows, tokens, sizes.hidden)).astype(dtype)
                for what, runner in runners.items():
                    runner.bind({"x": x, **models[what][1](given.rows, tokens)})
                taken = interleaved(runners, given.runs)
                dense = statistics.median(taken["dense"])
                for what, times in taken.items():
                    low, middle, high = np.quantile(times, [0.1, 0.5, 0.9]) * 1e3
                    print(
                        f"{dtype} {tokens:5} tokens  {what:36} {middle:9.3f} ms ({low:.3f}–{high:.3f})  {middle / dense / 1e3:5.2f} ×"
                    )


if __name__ == "__main__":
    main()
