"""The goldens that llama.cpp's converter wrote, and the checks that an adapter read from them must pass."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing

HERE = Path(__file__).parent / "golden" / "gguf"
CASES = tuple(sorted(path.name for path in HERE.iterdir() if (path / "golden.json").is_file()))
FILES = tuple(case for case in CASES if (HERE / case / "adapter.gguf").is_file())
# The converter rounds the factors to these types; what is read is compared with the trained ones.
TOLERANCE = {"llama_f16": 1e-3, "llama_bf16": 8e-3, "llama_q8_0": 1e-2}


def file_of(case):
    return HERE / case / "adapter.gguf"


def config_of(case):
    return json.loads((HERE / case / "config.json").read_text())


@functools.cache
def truth_of(case):
    """Tensor of the model in GGUF → its change."""
    tensors = load_file(HERE / case / "truth.safetensors")
    return {name.removeprefix("delta."): value for name, value in tensors.items() if name.startswith("delta.")}


def check_deltas(case):
    """Exactly the tensors that merging changes in llama.cpp's model, by what it changes them."""
    testing.check_golden(lf.load(file_of(case)), truth_of(case), TOLERANCE.get(case, 1e-6))
