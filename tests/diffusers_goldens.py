"""The goldens of diffusers, and how they are compared."""

from pathlib import Path

from safetensors.numpy import load_file

import loraformat as lf
from loraformat.testing import relative_error

GOLDEN = Path(__file__).parent / "golden" / "diffusers"
FILE = "pytorch_lora_weights.safetensors"
CASES = ("sd", "sd-no-header", "sdxl", "flux", "flux-dora", "flux-bias", "alphas", "processors", "bare")


def golden(case):
    """(path, key → ΔW that diffusers computed, key → the base weight where a magnitude needs it)."""
    tensors = load_file(GOLDEN / case / "delta.safetensors")
    bases = {name.removeprefix("base "): t for name, t in tensors.items() if name.startswith("base ")}
    return GOLDEN / case / FILE, {k: t for k, t in tensors.items() if not k.startswith("base ")}, bases


def check_deltas(adapter, case):
    """The adapter changes what diffusers changed, by the ΔW that it computed."""
    _, wanted, bases = golden(case)
    named = {key if key in wanted else key.replace(":text_model.", ":"): update for key, update in adapter.items()}
    assert set(named) == set(wanted)  # transformers 5 has no text_model in CLIP's text model, the files name it
    for key, update in named.items():
        error = relative_error(_delta(update, wanted[key].shape, bases.get(key)), wanted[key])
        assert error <= (2e-6 if bases else 1e-6), (key, error)


def _delta(update, shape, base):
    """ΔW in the base tensor's axes: torch's Linear is [out, in]."""
    if update.placement is None:
        update = update.placed(lf.Placement.of(shape, "out,in" if len(shape) == 2 else "out"))
    return update.delta(base)
