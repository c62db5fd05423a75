"""Every adapter that a real tool wrote, combined with itself and resized: ΔW as defined, whatever its kinds and layout."""

from pathlib import Path

import numpy as np
import pytest

import loraformat as lf
from loraformat import registry

GOLDEN = Path(__file__).parent / "golden"
ENDINGS = (".safetensors", ".gguf", ".npz", ".bin")
NO_ADAPTERS = ("truth", "base", "delta", "model", "ours", "made")


def sources():
    """Folders with a configuration, and files beside none."""
    folders = {path.parent for path in GOLDEN.rglob("adapter_config.json")}
    files = [
        path
        for path in GOLDEN.rglob("*")
        if path.suffix in ENDINGS and path.parent not in folders and not path.stem.startswith(NO_ADAPTERS)
    ]
    return sorted({*folders, *files})


def read(path):
    try:
        return registry.read(path)[0].adapter
    except lf.LoraFormatError:
        return None


def off(update, matrix):
    """How far the update is from ``matrix``, relative."""
    wanted = np.asarray(matrix, np.float64)
    return np.linalg.norm(update.matrix() - wanted) / (np.linalg.norm(wanted) or 1.0)


def check_sum(adapter, method, **how):
    made = lf.combine([(adapter, 0.5), (adapter, -1.5)], method, **how).adapter
    for key, update in adapter.items():
        assert off(made[key], -update.matrix()) < 3e-6, key
        assert made[key].placement == update.placement


def check_resized(adapter):
    made = lf.resize(adapter, energy=0.8)
    for key, update in adapter.items():
        if key in made.residuals:
            assert off(made.adapter[key], update.matrix()) == pytest.approx(made.residuals[key], abs=3e-6)
        else:
            assert made.adapter[key] is update


@pytest.mark.slow
def test_every_golden_is_combined_with_itself_and_resized():
    done = {"sum": 0, "resize": 0}
    for path in sources():
        adapter = read(path)
        if adapter is None:
            continue
        if all(update.linear for update in adapter.values()):
            check_sum(adapter, "cat")
            check_sum(adapter, "svd", rank=10_000)
            done["sum"] += 1
        if any(update.rank for update in adapter.values()):
            check_resized(adapter)
            done["resize"] += 1
    assert min(done.values()) >= 30, done
