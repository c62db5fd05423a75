"""Merge an adapter of all linears (r 16) into a sharded bf16 checkpoint, against a plain copy and against PEFT.

The checkpoints are Llamas of random values, 0.8, 1.7 and 3.4 GB: time grows with the size, memory does not. The copy
is ``cp -r`` and a sync of its files, as the merge syncs its own; PEFT's way is from_pretrained, merge_and_unload and
save_pretrained. Outputs are deleted before each run. ``python bench/merge.py`` alone runs this one.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ml_dtypes
import numpy as np

import loraformat as lf
from bench.chart import time_and_memory
from bench.measure import Run, Timing, command, interleave, row
from loraformat import registry, serializer
from loraformat.verbs.convert import save

HIDDEN, INNER, VOCAB, HEADS, KEY_HEADS = 2048, 5632, 32000, 32, 4
RANK, SHARD = 16, 500_000_000
LAYERS = {"0.8 GB": 6, "1.7 GB": 17, "3.4 GB": 36}
WHOLE = "1.7 GB"

PEER = """
import os, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], max_shard_size="500MB")
for name in os.listdir(sys.argv[3]):
    os.fsync(os.open(os.path.join(sys.argv[3], name), os.O_RDONLY))
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama, as transformers names them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    narrow = HIDDEN // HEADS * KEY_HEADS
    for i in range(layers):
        stem = f"model.layers.{i}"
        for name, out, in_ in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", narrow, HIDDEN),
            ("self_attn.v_proj", narrow, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            found[f"{stem}.{name}.weight"] = (out, in_)
        found[f"{stem}.input_layernorm.weight"] = found[f"{stem}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def make_model(folder: Path, layers: int) -> Path:
    """Random values in shards of at most 500 MB, with index and configuration."""
    folder.mkdir()
    draw, groups, size = np.random.default_rng(0), [[]], 0
    for name, shape in shapes(layers).items():
        count = 2 * int(np.prod(shape))
        if size + count > SHARD:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += count
    total, homes = 0, {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        tensors = {n: (0.02 * draw.standard_normal(s, np.float32)).astype(ml_dtypes.bfloat16) for n, s in group}
        with open(folder / file, "wb") as handle:
            serializer.write(handle, tensors, {"format": "pt"})
        homes |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(path: Path, layers: int) -> Path:
    """A PEFT folder: factors of every linear but the head."""
    draw, updates = np.random.default_rng(1), {}
    for name, shape in shapes(layers).items():
        if "_proj" in name:
            a, b = (0.02 * draw.standard_normal(s, np.float32) for s in ((RANK, shape[1]), (shape[0], RANK)))
            updates[name] = lf.Update((lf.Lora(a, b, 2.0 * RANK, "alpha/r"),))
    save(lf.Adapter(updates), path, registry.layout("peft"))
    return path


def fresh(out: Path, *words: str) -> Run:
    """A runner of a command that writes ``out``, which does not exist then."""
    run = command(*words)

    def runner() -> tuple[float, float, int]:
        shutil.rmtree(out, ignore_errors=True)
        done = run()
        shutil.rmtree(out)
        return done

    return runner


def make(folder: Path) -> None:
    """Every checkpoint and adapter; in a process of its own, whose memory no measured one inherits (ru_maxrss)."""
    for size, layers in LAYERS.items():
        make_model(folder / size, layers)
        make_adapter(folder / f"{size}.adapter", layers)


def variants(folder: Path, peer: bool) -> dict[str, Run]:
    found, python = {}, sys.executable
    command(python, __file__, str(folder))()
    loraformat, out = "from loraformat.cli.main import main; main()", folder / "out"
    for size in LAYERS:
        base, adapter = folder / size, folder / f"{size}.adapter"
        found[f"copy {size}"] = fresh(out, "/bin/sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(base), str(out))
        words = ("merge", str(adapter), "--into", str(base), "-o", str(out))
        found[f"merge {size}"] = fresh(out, python, "-c", loraformat, *words)
        if peer and size == WHOLE:
            found[f"PEFT {size}"] = fresh(out, python, "-c", PEER, str(base), str(adapter), str(out))
    return found


def main(runs: int = 3) -> None:
    peer = importlib.util.find_spec("peft") is not None
    with tempfile.TemporaryDirectory() as name:
        timings = interleave(variants(Path(name), peer), runs)
    for label, timing in timings.items():
        what, _, size = label.partition(" ")
        budget = {"copy": "the limit", "merge": "budget ≤ 2.0 ×, ≤ 300 MiB", "PEFT": "peer"}[what]
        print(row(label, timing, timings[f"copy {size}"], budget))
    labels = {"copy": "cp -r and sync", "merge": "loraformat merge", "PEFT": "PEFT merge_and_unload"}
    series: dict[str, dict[float, Timing]] = {label: {} for label in labels.values()}
    for label, timing in timings.items():
        what, size, _ = label.split(" ")
        series[labels[what]][float(size)] = timing
    time_and_memory("merge", "checkpoint, GB", {k: v for k, v in series.items() if v}, ("cp -r and sync",))


if __name__ == "__main__":
    make(Path(sys.argv[1])) if sys.argv[1:] else main()
