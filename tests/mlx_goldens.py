"""The goldens that mlx-lm wrote, and the checks that an adapter read from them must pass."""

from __future__ import annotations

import functools
from pathlib import Path

from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing
from loraformat.source import open_source

HERE = Path(__file__).parent / "golden" / "mlx"
CASES = ("linear", "half", "every", "embedding", "experts", "dora", "full")


def adapter_of(case):
    return HERE / case / "adapter"


def base_of(case):
    return HERE / case / "base.safetensors"


@functools.cache
def truth_of(case):
    return load_file(HERE / case / "truth.safetensors")


def check_deltas(case):
    """Exactly the weights that mlx-lm's fuse changed, by what it changed them."""
    adapter = lf.load(adapter_of(case))
    linear = {key: "out,in" for key, update in adapter.items() if update.kind != "replace" and not update.placement}
    adapter = lf.bind(adapter, lf.open_base(base_of(case)), lf.Hints(axes=linear))  # nn.Linear's own, whatever fits
    base = load_file(base_of(case))
    wanted = {name[6:]: value for name, value in truth_of(case).items() if name.startswith("delta.")}
    assert sorted(adapter) == sorted(wanted)
    for key, delta in wanted.items():
        assert testing.relative_error(adapter[key].delta(base[key]), delta) <= 1e-6, key


def check_rewritten(case, folder):
    """Read, kept as a native file and written again: the same tensors, the same configuration, both byte for byte."""
    lf.convert(adapter_of(case), folder / "kept.lora.safetensors", to_layout="native")
    lf.convert(folder / "kept.lora.safetensors", folder / "again", to_layout="mlx")
    before, after = (dict(open_source(path).tensors) for path in (adapter_of(case), folder / "again"))
    assert {n: (t.dtype, t.shape, t.tobytes()) for n, t in before.items()} == {
        n: (t.dtype, t.shape, t.tobytes()) for n, t in after.items()
    }
    texts = [(path / "adapter_config.json").read_bytes() for path in (adapter_of(case), folder / "again")]
    assert texts[0] == texts[1]
