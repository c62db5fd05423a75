"""The layers of a Llama 8B on a GPU: every way to attach, with and without CUDA graphs, beside PEFT on the same card.

``python -m bench.onnx_cuda [--form plain|int4] [--dtype float16|float32] [--tokens 1 8 128 1024]``, with
onnxruntime-gpu; PEFT's rows need torch and peft. ``--draw`` takes the tables that it has printed, and makes
docs/onnx_cuda.svg. Inputs and outputs stay on the device at fixed addresses. All variants run interleaved; times are
medians of the wall, and a ratio is to the dense layers as exported: those of ONNX Runtime to the ONNX model's, PEFT's to
torch's. Products of float32 are in TF32, as both have it by default or are told to.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bench.chart import ratios
from bench.onnx_modes import FORMS, Sizes, adapter, variants, write_model
from loraformat import Placement, merge, open_base
from loraformat.sketch import sketch
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.effective import Effective

Run = Callable[[], None]
FORM = {"cuda": FORMS["cuda"]}
LLAMA = (4, 4096, 14336, 1024, 16)


def fixed(path: Path, feeds: Mapping[str, np.ndarray], graph: bool) -> Run:
    """A run of the model on the device, with every buffer at one address; captured once where ``graph``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1" if graph else "0"})
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider, "CPUExecutionProvider"])
    binding, held = session.io_binding(), []
    for name, values in feeds.items():
        held.append(tort.value(onnxruntime.OrtValue, np.ascontiguousarray(values), "cuda"))
        binding.bind_ortvalue_input(name, held[-1])
    out = tort.value(onnxruntime.OrtValue, np.zeros_like(feeds["x"]), "cuda")
    binding.bind_ortvalue_output(session.get_outputs()[0].name, out)

    def run(kept: Any = (session, held, out)) -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run()
    return run


def onnx_runs(models: Mapping[str, tuple[Path, Any]], x: np.ndarray, graph: bool) -> dict[str, Run]:
    """Those that run; why another does not."""
    found = {}
    for what, (path, fed) in models.items():
        try:
            found[what] = fixed(path, {"x": x, **fed(*x.shape[:2])}, graph)
        except Exception as error:  # of any part of ONNX Runtime
            print(f"{what}{', CUDA graph' if graph else ''}: not run: {str(error).splitlines()[0][:160]}")
    return found


def effective_run(path: Path, sizes: Sizes, x: np.ndarray, graph: bool) -> tuple[Run, Callable[[], float]]:
    """A run with W + ΔW in the weights, and the milliseconds of a change from one of two adapters to the other."""
    given = {name: adapter(sizes, seed, x.dtype.name) for seed, name in enumerate("ab")}
    running = Effective(path, given, ["CUDAExecutionProvider"], captured=graph)
    names = iter("ab" * 1000)

    def change() -> float:
        begin = time.perf_counter()
        running.use(next(names))
        return 1e3 * (time.perf_counter() - begin)

    change()
    binding = running.inference.io_binding()
    values = {**running.values, "x": tort.value(onnxruntime.OrtValue, x, "cuda")}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    out = tort.value(onnxruntime.OrtValue, np.zeros_like(x), "cuda")
    binding.bind_ortvalue_output(running.inference.get_outputs()[0].name, out)

    def run(kept: Any = (running, values, out)) -> None:
        running.inference.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run()
    return run, change


def torch_layers(sizes: Sizes, dtype: str) -> Any:
    """The layers of ``write_model`` as a module."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = Sizes(1, sizes.hidden, sizes.wide, sizes.small, sizes.rank)
            for name, (rows, columns) in one.weights().items():
                self.add_module(name.rpartition(".")[2], torch.nn.Linear(rows, columns, bias=False))

        def forward(self, x: Any) -> Any:
            joined = torch.cat([self.k(x), self.v(x)] * (sizes.hidden // (2 * sizes.small)), -1)
            y = x + self.o(self.q(x) * joined)
            return y + self.down(torch.sigmoid(self.gate(y)) * self.up(y))

    with torch.device("cuda"):
        return (
            torch.nn.Sequential(*(Layer() for _ in range(sizes.layers))).to(getattr(torch, dtype)).requires_grad_(False)
        )


def torch_runs(sizes: Sizes, x: np.ndarray, graph: bool) -> dict[str, Run]:
    """Dense and with PEFT's branches: eager, or compiled with CUDA graphs."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.backends.cuda.matmul.allow_tf32 = True
    given, found = torch.from_numpy(x).cuda(), {}
    for what in ("torch, dense", "torch, PEFT"):
        model = torch_layers(sizes, x.dtype.name)
        if what == "torch, PEFT":
            names = [name.rpartition(".")[2] for name in sizes.weights()]
            config = LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=sorted(set(names)))
            model = get_peft_model(model, config, autocast_adapter_dtype=False).to(given.dtype).eval()
        call = torch.compile(model, mode="reduce-overhead") if graph else model

        def run(call: Any = call) -> None:
            with torch.inference_mode():
                call(given)
            torch.cuda.synchronize()

        for _ in range(3):
            run()
        found[what] = run
    return found


def measure(runs: Mapping[str, Run], count: int) -> dict[str, list[float]]:
    """Milliseconds of each run, one after the other."""
    taken: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(count + 5):
        for what, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn >= 5:
                taken[what].append(1e3 * (time.perf_counter() - begin))
    return taken


def show(label: str, taken: Mapping[str, list[float]]) -> None:
    for what, times in taken.items():
        low, middle, high = np.quantile(times, [0.1, 0.5, 0.9])
        dense = statistics.median(taken["torch, dense" if what.startswith("torch") else "dense"])
        print(f"{label}  {what:36} {middle:8.3f} ms ({low:.3f}–{high:.3f})  {middle / dense:5.2f} ×", flush=True)


def written(folder: Path, sizes: Sizes, form: str, dtype: str, stacks: list[int]) -> dict[str, tuple[Path, Any]]:
    """Every model, by what it is."""
    write_model(folder / "base.onnx", sizes, dtype, int4=form == "int4")
    models = variants(folder, sizes, dtype, stacks, forms=FORM)
    if form == "int4":
        models = {what: m for what, m in models.items() if what not in ("branch, concat", "branch, folded")}
    else:
        (folder / "merged").mkdir()
        merge(adapter(sizes, 0, dtype), open_base(folder / "base.onnx"), folder / "merged" / "model.onnx")
        models["merged"] = (folder / "merged" / "model.onnx", models["dense"][1])
        models |= packed(folder, sizes, dtype, stacks)
    return models


def packed(folder: Path, sizes: Sizes, dtype: str, stacks: list[int]) -> dict[str, tuple[Path, Any]]:
    """The same layers with q, k and v in one product, and gate and up; the adapters find their rows by sketches."""
    held = onnx.load(folder / "base.onnx").graph.initializer
    weights = {t.name.removesuffix(".w"): onnx.numpy_helper.to_array(t).T for t in held}
    places = {name: Placement(w.shape, (0,), (1,)) for name, w in weights.items()}
    bound = {
        f"{name}.weight": {"placement": places[name], "sketch": sketch(w, places[name])} for name, w in weights.items()
    }
    (folder / "packed").mkdir()
    write_model(folder / "packed" / "base.onnx", sizes, dtype, packed=True)
    models = variants(folder / "packed", sizes, dtype, stacks, bound, FORM)
    return {f"{what}, packed": model for what, model in models.items() if what != "branch, separate"}


_ROW = re.compile(r" *(\d+) tokens(, CUDA graph)? +(\S.*?)  +.* (\d+\.\d+) ×")


def draw(lines: Iterable[str]) -> None:
    """Printed rows as a plot."""
    panels: dict[str, dict[str, dict[int, float]]] = {"without CUDA graphs": {}, "with CUDA graphs": {}}
    for row in filter(None, map(_ROW.match, lines)):
        tokens, graph, what, ratio = row.groups()
        if not what.endswith(("dense", "packed", "merged")):  # the two models that have no adapter, and other weights
            panel = panels["with CUDA graphs" if graph else "without CUDA graphs"]
            panel.setdefault(what.partition(", widened")[0], {})[int(tokens)] = float(ratio)
    ratios("onnx_cuda", "tokens", panels)


def main() -> None:
    """A table for each number of tokens, without and with CUDA graphs."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--form", choices=["plain", "int4"], default="plain", help="of the base: floats, or 4 bits")
    asked.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    asked.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 128, 1024])
    asked.add_argument("--stacks", nargs="+", type=int, default=[8])
    asked.add_argument("--sizes", nargs=5, type=int, default=LLAMA, help="layers, hidden, wide, small, rank")
    asked.add_argument("--runs", type=int, default=40)
    asked.add_argument(
        "--only", help="of ONNX Runtime's variants those whose names have this pattern; dense among them"
    )
    asked.add_argument("--captured", action="store_true", help="with CUDA graphs alone")
    asked.add_argument("--draw", action="store_true", help="what was printed before, from standard input")
    given = asked.parse_args()
    if given.draw:
        draw(sys.stdin)
        return
    sizes = Sizes(*given.sizes)
    print(f"onnxruntime {onnxruntime.__version__}, {sizes}, {given.form}, {given.dtype}")
    onnxruntime.preload_dlls()
    plain = given.form == "plain" and not given.only
    peft = importlib.util.find_spec("peft") is not None and plain
    with tempfile.TemporaryDirectory() as name:
        models = written(Path(name), sizes, given.form, given.dtype, given.stacks)
        models = {what: m for what, m in models.items() if re.search(given.only or "", what)}
        for tokens in given.tokens:
            x = np.random.default_rng(3).standard_normal((1, tokens, sizes.hidden)).astype(given.dtype)
            for graph in (True,) if given.captured else (False, True):
                label = f"{tokens:5} tokens{', CUDA graph' if graph else '            '}"
                runs = onnx_runs(models, x, graph)
                if plain:
                    runs["in the weights"], change = effective_run(Path(name) / "base.onnx", sizes, x, graph)
                if peft:
                    runs |= torch_runs(sizes, x, graph)
                show(label, measure(runs, given.runs))
                if plain:
                    low, middle, high = np.quantile([change() for _ in range(20)], [0.1, 0.5, 0.9])
                    print(f"{label}  a change in the weights              {middle:8.3f} ms ({low:.3f}–{high:.3f})")
                    del change
                del runs
                gc.collect()


if __name__ == "__main__":
    main()
