"""A LoRA of kohya's, with its text encoder, in a folder of ONNX models: equal to what diffusers computes with it."""

from pathlib import Path

import numpy as np
import pytest
from graphs import session
from safetensors.numpy import load_file

import loraformat as lf
from loraformat.testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
KOHYA = GOLDEN / "kohya" / "onnx" / "kohya.safetensors"
PIPELINE = GOLDEN / "onnx" / "pipeline"


def outputs(folder):
    """(what the text encoder and the denoiser say of the golden's inputs)."""
    feeds = load_file(PIPELINE / "truth.safetensors")
    feeds["timestep"] = feeds["timestep"].astype(np.float32)
    found = []
    for component in ("text_encoder", "unet"):
        running = session(folder / component / "model.onnx")
        taken = {i.name for i in running.get_inputs()}
        found.append(running.run(None, {name: feeds[name] for name in taken})[0])
    return found


@pytest.fixture(scope="module")
def adapter():
    return lf.retarget(lf.load(KOHYA), base=lf.open_base(PIPELINE / "model"))


def test_the_names_are_those_of_the_graphs(adapter):
    assert adapter.adapter.components == ("text_encoder", "unet")
    assert len(adapter.adapter) == len(lf.load(KOHYA))
    assert adapter.evidence == ("base: its names",)


@pytest.mark.parametrize("verb", ["merge", "attach"])
def test_the_models_compute_what_diffusers_computes(verb, adapter, tmp_path):
    getattr(lf, verb)(adapter.adapter, lf.open_base(PIPELINE / "model"), tmp_path / "out")
    truth = load_file(KOHYA.with_name("truth.safetensors"))
    hidden, noise = outputs(tmp_path / "out")
    assert relative_error(hidden, truth["adapted.hidden"]) <= 1e-5
    assert relative_error(noise, truth["adapted.noise"]) <= 1e-5
    for before, after in zip(outputs(PIPELINE / "model"), (hidden, noise), strict=True):
        assert relative_error(before, after) > 1e-2


def test_the_names_of_another_space_lead_to_retarget():
    with pytest.raises(lf.LoraFormatError, match="loraformat retarget"):
        lf.merge(lf.load(KOHYA), lf.open_base(PIPELINE / "model"), "out")
