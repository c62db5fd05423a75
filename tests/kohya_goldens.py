"""The goldens that LyCORIS and sd-scripts wrote, and the checks that an adapter read from them must pass.

The checks are plain functions, so that ``test_kohya_mutants`` can run the very same ones on code that is made wrong.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import registry, testing

HERE = Path(__file__).parent / "golden" / "kohya"
LAYOUT = registry.layout("kohya")

LYCORIS = (
    *("locon", "locon_bf16", "locon_tucker", "locon_scalar", "locon_rslora", "dora", "dora_in"),
    *("loha", "loha_tucker", "loha_dora", "loha_dora_in"),
    *("lokr", "lokr_both", "lokr_whole", "lokr_tucker", "lokr_dora", "full", "norm", "mixed"),
)
SD_SCRIPTS = ("sd15", "encoders", "old", "split_qkv")
SUPPORTED = (*LYCORIS, *SD_SCRIPTS)
# Case → words of the reason.
REFUSED = {
    "glora": "GLoRA, whose ΔW is made from the base weight",
    "ia3": "IA3, which multiplies the base weight",
    "diag_oft": "OFT or BOFT, which multiplies the base weight",
    "boft": "OFT or BOFT, which multiplies the base weight",
    "tlora": "T-LoRA, whose rank is chosen by the time step",
}


def file_of(case):
    return HERE / case / "adapter.safetensors"


def facts_of(case):
    return json.loads((HERE / case / "golden.json").read_text())


def loaded(case, **options):
    return registry.read(file_of(case), options=registry.ReadOptions(**options))[0].adapter


def truth_of(case, what="delta"):
    """Key → tensor: ``delta`` as the tool computed it, the ``base`` that it depends on, what was ``trained``."""
    tensors = load_file(HERE / case / "truth.safetensors")
    return {name.removeprefix(f"{what}."): t for name, t in tensors.items() if name.startswith(f"{what}.")}


def as_torch(update, shape):
    """The update as torch's own module has its weight, where the file left that open; else as it says."""
    place = lf.Placement(shape, (0,), tuple(range(1, len(shape))))
    return update if update.placement is not None else update.placed(place)


def check_against(adapter, deltas, bases, tolerance=1e-6):
    """The adapter changes the same parameters, by the ΔW that the tool computed."""
    assert sorted(adapter) == sorted(deltas)
    for key, wanted in deltas.items():
        update, base = as_torch(adapter[key], wanted.shape), bases.get(key)
        found = update.delta() if base is None else update.apply(base) - base
        error = testing.relative_error(found, wanted)
        assert error <= tolerance, f"{key}: ΔW is off by {error:.2g}"


def check_deltas(case):
    check_against(loaded(case), truth_of(case), truth_of(case, "base"))


def check_scales(case):
    """The scale of every module is that of the tool's own module."""
    adapter = loaded(case)
    for module, scale in facts_of(case)["scales"].items():
        assert np.isclose(adapter[f"{module}.weight"].scale, scale, rtol=1e-6), module


def check_rewrite(case, folder):
    """Written again, through the native file: the same tensors byte for byte, and the same header."""
    lf.convert(file_of(case), folder / "native.lora.safetensors")
    lf.convert(folder / "native.lora.safetensors", folder / "again.safetensors", to_layout="kohya")
    before, after = (registry.open_source(path) for path in (file_of(case), folder / "again.safetensors"))
    assert sorted(before.tensors) == sorted(after.tensors)
    for name, tensor in before.tensors.items():
        other = after.tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (other.dtype, other.shape, other.tobytes()), name
    assert dict(before.header) == dict(after.header)
