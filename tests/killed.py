"""Merges that are killed at random moments; run as ``python killed.py FOLDER ROUNDS SEED``.

Each round forks a process that merges over an existing output, kills it without warning, and looks at what is there:
the old output or the new one, whole. Prints how many were killed before and after the output changed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import loraformat as lf


def make(home):
    """A base of three shards, and two adapters."""
    (home / "base").mkdir()
    draw, homes = np.random.default_rng(0), {}
    for i in range(3):
        tensors = {f"l{i}.{n}.weight": draw.standard_normal((90 + n, 80), np.float32) for n in range(3)}
        save_file(tensors, home / "base" / f"model-{i}.safetensors")
        homes |= dict.fromkeys(tensors, f"model-{i}.safetensors")
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (home / "base" / "tokenizer.json").write_text("{}" * 5000)
    adapters = []
    for _ in range(2):
        pairs = {n: (draw.standard_normal((2, 80)), draw.standard_normal((90 + int(n[3]), 2))) for n in homes}
        adapters.append(lf.Adapter({n: lf.Update((lf.Lora(a, b, 1.0, "factor"),)) for n, (a, b) in pairs.items()}))
    return adapters


def content(path):
    if path.is_dir():
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes() if path.exists() else None


def merge(adapter, base, out):
    lf.merge(adapter, lf.open_base(base), out, force=True)


def start(adapter, base, out):
    """A process that merges."""
    child = os.fork()
    if not child:
        merge(adapter, base, out)
        os._exit(0)
    return child


def rounds_of(adapters, base, out, rounds):
    """How often the process was killed with the old output there, with the new one, and between two renames."""
    wanted, slowest, aside = [], 0.0, out.with_name(f".{out.name}.old")
    for adapter in (*adapters, *adapters):
        begin = time.perf_counter()
        os.waitpid(start(adapter, base, out), 0)
        slowest = max(slowest, time.perf_counter() - begin)
        wanted.append(content(out))
    assert wanted[0] != wanted[1]
    assert wanted[:2] == wanted[2:]
    old, new, between, now = 0, 0, 0, 1
    for i in range(rounds):
        child = start(adapters[1 - now], base, out)
        time.sleep(random.uniform(0, 1.2 * slowest))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = content(out)
        assert not aside.exists() or content(aside) in wanted[:2], f"round {i}: {aside.name} is not whole"
        if found is None:
            between += 1
            assert content(aside) == wanted[now], f"round {i}: the output is gone"
            continue
        assert found in wanted[:2], f"round {i}: neither the old output nor the new one"
        changed = found != wanted[now]
        old, new = old + (killed and not changed), new + (killed and changed)
        now = 1 - now if changed else now
    merge(adapters[0], base, out)
    assert content(out) == wanted[0]
    return old, new, between


def main(home, rounds, seed):
    random.seed(seed)
    adapters = make(home)
    print("out", *rounds_of(adapters, home / "base", home / "out", rounds))
    few = [lf.Adapter({k: v for k, v in a.items() if k[1] == "0"}) for a in adapters]
    print("file", *rounds_of(few, home / "base" / "model-0.safetensors", home / "out.safetensors", rounds))
    left = sorted(p.name for p in home.iterdir())
    assert left == ["base", "out", "out.safetensors"], left


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
