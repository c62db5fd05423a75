"""Combine two adapters of rank 16 and resize one of rank 64, against PEFT and against dense decompositions.

The targets are those of decoder layers (q, k, v, o: 1024 × 1024; gate, up: 2816 × 1024; down: 1024 × 2816), seven a
layer. Only the call is timed, with everything in memory: ``lf.combine`` and PEFT's ``add_weighted_adapter``, each in a
process of its own; a run of PEFT takes most of a minute, so that it is run once. Both results must be the same.
``python bench/algebra.py`` alone runs this one.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import loraformat as lf
from bench.chart import time_and_memory
from bench.measure import Run, Timing, interleave, row

HIDDEN, INNER, RANK = 1024, 2816, 16
LAYER = (
    ("a_q", HIDDEN, HIDDEN),
    ("b_k", HIDDEN, HIDDEN),
    ("c_v", HIDDEN, HIDDEN),
    ("d_o", HIDDEN, HIDDEN),
    ("e_gate", INNER, HIDDEN),
    ("f_up", INNER, HIDDEN),
    ("g_down", HIDDEN, INNER),
)
LAYERS = (1, 4, 16)
WEIGHTS, DENSITY = (0.7, 0.4), 0.5
METHODS = ("svd", "ties_svd")
RESIZED, FROM = 200, 64
BUDGETS = {"svd": "budget ≥ 100 ×", "ties_svd": "budget ≥ 20 ×", "resize": "budget ≥ 100 ×"}


def shapes(count: int) -> dict[str, tuple[int, int]]:
    """Names in the order of their modules, which is the sorted one."""
    return {f"l{i:03}.{name}": (out, in_) for i in range(count // 7 + 1) for name, out, in_ in LAYER}


def factors(seed: int, count: int, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(seed)
    found = list(shapes(count).items())[:count]
    return {
        name: (draw.standard_normal((rank, in_), np.float32), draw.standard_normal((out, rank), np.float32))
        for name, (out, in_) in found
    }


def adapter(seed: int, count: int, rank: int = RANK) -> lf.Adapter:
    pairs = factors(seed, count, rank)
    return lf.Adapter({f"{n}.weight": lf.Update((lf.Lora(a, b, 1.0, "factor"),)) for n, (a, b) in pairs.items()})


def ours(method: str, count: int, out: Path) -> tuple[float, float]:
    """Seconds on the wall and of the processor; what was computed goes to ``out``."""
    given = [(adapter(seed, count), weight) for seed, weight in zip((1, 2), WEIGHTS, strict=True)]
    how = {"density": DENSITY} if method == "ties_svd" else {}
    combine = lf.combine  # imports it; PEFT has been imported too when it is called
    begin, worked = time.perf_counter(), time.process_time()
    done = combine(given, f"peft_{method}", rank=RANK, **how)
    taken = time.perf_counter() - begin, time.process_time() - worked
    keep(out, {key: (u["lora"].lora_A, u["lora"].lora_B) for key, u in done.adapter.items()})
    return taken


def peft(method: str, count: int, out: Path) -> tuple[float, float]:
    import torch
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Module()
    for name, (rows, columns) in list(shapes(count).items())[:count]:
        layer, _, leaf = name.partition(".")
        if not hasattr(model, layer):
            model.add_module(layer, torch.nn.Module())
        getattr(model, layer).add_module(leaf, torch.nn.Linear(columns, rows, bias=False))
    model.config = {"model_type": "custom", "tie_word_embeddings": False}
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[name for name, _, _ in LAYER])
    whole = get_peft_model(model, config, adapter_name="one")
    whole.add_adapter("two", config)
    modules = dict(model.named_modules())
    for label, seed in (("one", 1), ("two", 2)):
        for name, (a, b) in factors(seed, count, RANK).items():
            modules[name].lora_A[label].weight.data = torch.from_numpy(a)
            modules[name].lora_B[label].weight.data = torch.from_numpy(b)
    how = {"density": DENSITY} if method == "ties_svd" else {}
    begin, worked = time.perf_counter(), time.process_time()
    whole.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type=method, svd_rank=RANK, **how)
    taken = time.perf_counter() - begin, time.process_time() - worked
    sides = ("lora_A", "lora_B")
    names = list(factors(1, count, 1))
    keep(
        out,
        {f"{n}.weight": tuple(getattr(modules[n], s)["both"].weight.detach().numpy() for s in sides) for n in names},
    )
    return taken


def keep(out: Path, pairs: dict[str, tuple[np.ndarray, ...]]) -> None:
    np.savez(out, **{f"{key}|{side}": t for key, pair in pairs.items() for side, t in zip("AB", pair, strict=True)})


def resized(count: int) -> tuple[float, float]:
    source, resize = adapter(3, count, FROM), lf.resize
    begin, worked = time.perf_counter(), time.process_time()
    resize(source, rank=RANK)
    return time.perf_counter() - begin, time.process_time() - worked


def dense(count: int) -> tuple[float, float]:
    """ΔW of each target decomposed whole, and the residual compared; of one layer, for its share of the time."""
    source, seconds, processor = adapter(3, 7, FROM), 0.0, 0.0
    mine = lf.resize(source, rank=RANK).residuals
    for key, update in source.items():
        begin, worked = time.perf_counter(), time.process_time()
        _, s, _ = np.linalg.svd(update.matrix(), full_matrices=False)
        seconds, processor = seconds + time.perf_counter() - begin, processor + time.process_time() - worked
        values = s.astype(np.float64)
        assert abs(np.linalg.norm(values[RANK:]) / np.linalg.norm(values) - mine[key]) < 1e-6, key
    return seconds * count / 7, processor * count / 7


def child(*words: str) -> Run:
    """Runs a part of this file in a process of its own, which tells the seconds of the call."""

    def run() -> tuple[float, float, int]:
        done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
        wall, worked, peak = json.loads(done.stdout.splitlines()[-1])
        return wall, worked, peak

    return run


def once(run: Run) -> Timing:
    wall, worked, peak = run()
    return Timing([wall], [worked], peak)


def distance(one: Path, other: Path) -> float:
    """The largest ‖ΔW − ΔW'‖ / ‖ΔW'‖ of two results."""
    a, b = np.load(one), np.load(other)
    keys = {name.partition("|")[0] for name in b}
    whole = {key: [f[f"{key}|B"].astype(float) @ f[f"{key}|A"] for f in (a, b)] for key in keys}
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in whole.values())


def compared(folder: Path, method: str, count: int, runs: int, peer: bool) -> tuple[Timing, Timing | None]:
    label = f"{method} {count}"
    mine = interleave({label: child("ours", method, str(count), str(folder / "mine.npz"))}, runs)[label]
    if not peer:
        return mine, None
    theirs = once(child("peft", method, str(count), str(folder / "theirs.npz")))
    print(row(f"PEFT {label}", theirs, theirs, "peer, one run"))
    apart = distance(folder / "mine.npz", folder / "theirs.npz")
    faster = theirs.median / mine.median
    print(row(f"combine {label}", mine, theirs, f"{faster:.0f} × faster, {BUDGETS[method]}; ΔW apart by {apart:.1e}"))
    return mine, theirs


def main(runs: int = 3, peers: tuple[int, ...] = (1, 4)) -> None:
    """``peers``: for how many layers PEFT is run."""
    peer = importlib.util.find_spec("peft") is not None
    series: dict[str, dict[float, Timing]] = {}
    with tempfile.TemporaryDirectory() as name:
        for method in METHODS:
            for layers in LAYERS:
                mine, theirs = compared(Path(name), method, 7 * layers, runs, peer and layers in peers)
                series.setdefault(f"loraformat {method}", {})[7 * layers] = mine
                if theirs:
                    series.setdefault(f"PEFT {method}", {})[7 * layers] = theirs
    mine = interleave({"resize": child("resized", str(RESIZED))}, runs)["resize"]
    whole = once(child("dense", str(RESIZED)))
    print(row(f"dense SVD {RESIZED}", whole, whole, "one layer, times its share"))
    print(row(f"resize {RESIZED}", mine, whole, f"{whole.median / mine.median:.0f} × faster, {BUDGETS['resize']}"))
    time_and_memory("algebra", "targets", series, (), log=True)


def part(name: str, *words: str) -> None:
    import resource

    work = {"ours": ours, "peft": peft, "resized": resized, "dense": dense}[name]
    wall, worked = work(*(int(w) if w.isdigit() else Path(w) if w.endswith(".npz") else w for w in words))
    print(json.dumps([wall, worked, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


if __name__ == "__main__":
    part(*sys.argv[1:]) if sys.argv[1:] else main()
