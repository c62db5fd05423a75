"""The goldens that gemma, jax-lorax and MaxText wrote, and the checks that an adapter read from them must pass."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

import loraformat as lf
from loraformat import registry
from loraformat.layout import ReadOptions
from loraformat.testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
GEMMA, LORAX, MAXTEXT = (GOLDEN / name for name in ("gemma", "lorax", "maxtext"))
GEMMA_CASES = ("gqa", "mha", "dense")
SCANNED = ("llama-0", "llama-1", "qwen3-0", "qwen3-1")


@functools.cache
def expected(folder):
    """Key → what the tool computed: {W, x, y, equation, merged}."""
    with np.load(folder / "expected.npz") as arrays:
        found = {}
        for name in arrays.files:
            key, _, word = name.rpartition("|")
            found.setdefault(key, {})[word] = arrays[name]
    found.pop("", None)
    return found


def base_of(folder, tmp_path):
    """The weights as a base, for the shapes that a file does not hold."""
    np.savez(tmp_path / "base.npz", **{key: case["W"] for key, case in expected(folder).items()})
    return lf.open_base(tmp_path / "base.npz")


def check_gemma(case, tmp_path, based=True):
    """Every einsum computes with W + ΔW what it computed with its factors."""
    options = ReadOptions(base=base_of(GEMMA / case, tmp_path) if based else None)
    adapter, want = registry.read(GEMMA / case / "lora.msgpack", "gemma", options)[0].adapter, expected(GEMMA / case)
    assert sorted(adapter) == sorted(want)
    for key, one in want.items():
        if adapter[key].placement is None:
            assert not based, key
            continue
        assert adapter[key].placement.shape == one["W"].shape, key
        x, equation = one["x"], str(one["equation"])
        assert relative_error(np.einsum(equation, x, one["W"] + adapter[key].delta()), one["y"]) < 1e-6, key
        assert relative_error(np.einsum(equation, x, one["W"]), one["y"]) > 0.05, key


def check_merged(adapter, folder):
    """W + ΔW is what the tool made of W."""
    want = {key: case for key, case in expected(folder).items() if "merged" in case}
    assert set(want) <= set(adapter)
    for key, case in want.items():
        assert relative_error(adapter[key].delta(), case["merged"] - case["W"]) < 2e-6, key


def check_lorax(tmp_path=None, name="state.npz"):
    alpha = json.loads((LORAX / "golden.json").read_text())["alpha"]
    adapter = registry.read(LORAX / name, "lorax", ReadOptions(alpha=alpha))[0].adapter
    assert sorted(adapter) == sorted(expected(LORAX))
    check_merged(adapter, LORAX)
    conv = expected(LORAX)["conv/kernel"]
    kernel = conv["W"] + adapter["conv/kernel"].delta()
    windows = np.lib.stride_tricks.sliding_window_view(conv["x"], kernel.shape[:2], (1, 2))
    assert relative_error(np.einsum("bxyikl,klio->bxyo", windows, kernel), conv["y"]) < 1e-6
    return adapter


def config_of(case):
    return json.loads((MAXTEXT / case / "config.json").read_text())


def scanned(case, tmp_path, base=None):
    """MaxText's LoRA of Qwix, placed by the base's shapes."""
    options = ReadOptions(alpha=6.0, rank=3, base=base or base_of(MAXTEXT / case, tmp_path))
    return registry.read(MAXTEXT / case / "lora.npz", "qwix", options)[0].adapter
