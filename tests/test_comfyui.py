"""ComfyUI: what we write it finds in its models, by the names that it looks for, and computes what we say.

Its own code ran for the goldens; the files there are those that are written today, byte for byte.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from mutants import net
from safetensors.numpy import load_file

import loraformat as lf
from loraformat.testing import relative_error
from loraformat.verbs.convert import save
from loraformat_converters.kohya import form, layout
from loraformat_converters.spaces.families import FAMILIES

HERE = Path(__file__).parent / "golden/comfyui"
CASES = ("pairs", "core", "loha", "lokr", "whole", "dora_in")
KNOWN = ("sd1", "sdxl", "flux", "sd3-medium", "sd3.5-large")


def golden(case):
    """(adapter, key → ΔW that ComfyUI computed, key → the weight that it was added to)."""
    found = load_file(HERE / f"{case}.truth.safetensors")
    sides = ({n.removeprefix(f"{s}."): t for n, t in found.items() if n.startswith(f"{s}.")} for s in ("delta", "base"))
    return lf.load(HERE / f"{case}.safetensors"), *sides


def placed(update, shape):
    return update if update.placement is not None else update.placed(lf.Placement.of(shape, "out,in"))


def check_computes(case, folder):
    """ComfyUI's ΔW is the file's; and the file is what is written of it."""
    adapter, deltas, bases = golden(case)
    assert set(adapter) == set(deltas)
    for key, delta in deltas.items():
        ours = placed(adapter[key], delta.shape).delta(bases.get(key))
        assert relative_error(ours, delta) <= 2e-6, key
    save(adapter, folder / "again.safetensors", layout)
    assert (folder / "again.safetensors").read_bytes() == (HERE / f"{case}.safetensors").read_bytes()


def check_names(family, folder):
    """Every module of the model that we name is found there as the parameter that our table says it is."""
    theirs = json.loads(gzip.decompress((HERE / "names.json.gz").read_bytes()))[family]
    (found,) = (item for item in FAMILIES if item.name == family)
    seen = 0
    for key, links in found.written.items():
        component, colon, _ = key.partition(":")
        if not key.endswith(".weight") or not colon or component not in ("unet", "transformer"):
            continue
        for link in (link for link in links if link.there.name.endswith(".weight")):
            module = link.there.name.removesuffix(".weight")
            home = {f"diffusion_model.{row.published}" for row in _rows(found, component, key)}
            assert theirs[module] in home, (key, module)
            seen += 1
    assert seen > 300


def _rows(family, component, key):
    (part,) = (item for item in family.components if item.name == component)
    return (row for row in part.rows() if f"{component}:{row.torch}" == key)


CHECKS = {case: lambda folder, case=case: check_computes(case, folder) for case in CASES}
CHECKS |= {f"names of {family}": lambda folder, family=family: check_names(family, folder) for family in KNOWN}


def alpha_as_the_scale(patch):
    patch.setattr(form, "alpha", lambda part: part.scale)


def no_alpha(patch):
    patch.setattr(form, "alpha", lambda part: None)


test_the_goldens, test_a_mutant_turns_its_check_red = net(CHECKS, [(alpha_as_the_scale, "pairs"), (no_alpha, "loha")])


def test_a_dora_over_the_outputs_is_normalised_by_w_alone_as_is_said_of_comfyui():
    adapter, deltas, bases = golden("dora")
    ((key, delta),) = deltas.items()
    update, base = placed(adapter[key], delta.shape), bases[key]
    added = replace(update, parts=(update["lora"],)).delta()
    wanted = (
        update["magnitude"].magnitude[:, None] * (base + added) / np.linalg.norm(base, axis=1, keepdims=True) - base
    )
    assert relative_error(delta, wanted) <= 2e-6
    assert relative_error(update.delta(base), delta) > 0.1
