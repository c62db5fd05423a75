"""Quantised checkpoints that their tools wrote, and changes for them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from updates import normal

import loraformat as lf
from loraformat import container, serializer

GOLDEN = Path(__file__).parent / "golden" / "quantised"
BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LLAMA = {"model_type": "llama"}


def change(out, in_, size, key="q.weight"):
    part = lf.Lora(normal(2, in_, seed=1), normal(out, 2, seed=2) * np.float32(size), 1.0, "factor")
    return lf.Adapter({key: lf.Update((part,))})


def golden(name, tmp_path):
    """(the opened checkpoint, its tensors, what the tool says that the weight means)."""
    held = dict(container.Container(GOLDEN / f"{name}.safetensors").items())
    held = {key: np.array(value) for key, value in held.items()}
    means = held.pop("means", None)
    write(tmp_path / name, held)
    return lf.open_base(tmp_path / name), held, means


def write(path, held, config=LLAMA):
    path.mkdir()
    with open(path / "model.safetensors", "wb") as file:
        serializer.write(file, held, {})
    (path / "config.json").write_text(json.dumps(config))


def stored(path):
    return {name: np.array(value) for name, value in container.Container(path / "model.safetensors").items()}
