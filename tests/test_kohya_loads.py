"""What we write, LyCORIS and diffusers load: the same modules, and the numbers of the model that was written.

The adapters are made from the model alone, without a header or an alpha that a tool wrote.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from kohya_goldens import HERE, LAYOUT, as_torch, file_of, loaded
from safetensors import safe_open
from safetensors.numpy import load_file

import loraformat as lf
from loraformat.axes import Placement
from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude
from loraformat.testing import relative_error
from loraformat.updates import Update
from loraformat.verbs.convert import save
from loraformat_converters.kohya import magnitudes

pytestmark = pytest.mark.peer

DRAW = np.random.default_rng(5)
CONV = (35, 20, 3, 2)
PIPELINE = HERE.parent / "onnx" / "pipeline" / "model"


def normal(*shape, dtype=np.float32):
    return (0.4 * DRAW.standard_normal(shape)).astype(dtype)


def placed(part, *shape, more=()):
    return Update((part, *more), Placement(shape, (0,), tuple(range(1, len(shape)))))


def magnitude(n, axes=None):
    return Magnitude(1 + abs(normal(n)), axes, magnitudes.EPS)


# Case → module of the model below → update of its weight. Scales of every rule, also such as no float32 alpha gives.
CASES = {
    "pairs": {
        "to_q": Update((Lora(normal(3, 30), normal(42, 3), 4.5, "alpha/r"),)),
        "to_out_0": Update((Lora(normal(5, 12), normal(12, 5), 6.0, "alpha/sqrt(r)"),)),
        "conv": placed(Lora(normal(2, 120), normal(35, 2), -0.1, "factor"), *CONV),
        "line": placed(Lora(normal(4, 27, dtype=np.float16), normal(28, 4), 1e-3, "factor"), 28, 9, 3),
    },
    "cores": {
        "conv": placed(Lora(normal(3, 20), normal(35, 3), 0.7, "factor", normal(3, 3, 3, 2)), *CONV),
        "line": placed(Lora(normal(2, 9), normal(28, 2), 3.0, "alpha/r", normal(2, 2, 3)), 28, 9, 3),
    },
    "loha": {
        "to_q": Update((Loha(normal(42, 3), normal(3, 30), normal(42, 3), normal(3, 30), 0.3, "factor"),)),
        "conv": placed(
            Loha(*(normal(3, n) for n in (35, 20, 35, 20)), 5.0, "alpha/sqrt(r)", normal(3, 3, 3, 2), normal(3, 3, 3, 2)),
            *CONV,
        ),
    },
    "lokr": {
        "to_q": Update((Lokr(0.3, "factor", normal(6, 5), lokr_w2_a=normal(7, 2), lokr_w2_b=normal(2, 6)),)),
        "conv": placed(Lokr(1.0, "factor", normal(5, 4), lokr_w2=normal(7, 5, 3, 2)), *CONV),
    },
    "whole": {
        "to_q": placed(Delta(normal(42, 30)), 42, 30),
        "conv": placed(Delta(normal(35, 120)), *CONV),
        "norm": placed(Delta(normal(17)), 17),
    },
    "dora": {
        "to_q": placed(Lora(normal(3, 30), normal(42, 3), 4.5, "alpha/r"), 42, 30, more=[magnitude(42)]),
        "to_out_0": placed(Lora(normal(3, 12), normal(12, 3), 2.0, "factor"), 12, 12, more=[magnitude(12)]),
        "conv": placed(Lora(normal(2, 120), normal(35, 2), 3.0, "factor"), *CONV, more=[magnitude(35)]),
    },
}  # fmt: skip
BIASES = {"whole": {"to_q": 42, "conv": 35, "norm": 17}}  # LyCORIS has one wherever the layer has


def written(case):
    targets = {f"lycoris_{name}.weight": update for name, update in CASES[case].items()}
    biases = {f"lycoris_{name}.bias": placed(Delta(normal(n)), n) for name, n in BIASES.get(case, {}).items()}
    return lf.Adapter(targets | biases, "kohya")


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="the readers run on torch: pip install 'loraformat[peers]'")
    pytest.importorskip("lycoris", reason="pip install 'loraformat[peers]'")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def model(torch):
    torch.manual_seed(3)
    nn = torch.nn
    net = nn.Module()
    net.to_q, net.to_out = nn.Linear(30, 42), nn.ModuleList([nn.Linear(12, 12, bias=False)])
    net.conv, net.line, net.norm = nn.Conv2d(20, 35, (3, 2)), nn.Conv1d(9, 28, 3), nn.LayerNorm(17)
    return net.requires_grad_(False)


INPUTS = {"to_q": (2, 30), "to_out_0": (2, 12), "conv": (1, 20, 5, 4), "line": (1, 9, 5), "norm": (2, 17)}


def added(torch, lora):
    """What a LyCORIS module adds to its weight and bias while it runs, where it hands it to torch."""
    seen, op = {}, lora.op

    def spy(*args, **words):
        seen.update(zip(("weight", "bias"), args[1:], strict=False), **words)
        return op(*args, **words)

    lora.op = spy
    lora(torch.randn(INPUTS[lora.lora_name.removeprefix("lycoris_")]))
    return {
        f"{lora.lora_name}.{leaf}": seen[leaf].detach().numpy()
        for leaf in ("weight", "bias")
        if seen.get(leaf) is not None
    }


@pytest.mark.parametrize("case", CASES)
def test_lycoris_loads_what_is_written_and_computes_its_numbers(case, model, torch, tmp_path):
    from lycoris import create_lycoris_from_weights

    adapter = written(case)
    save(adapter, tmp_path / "a.safetensors", LAYOUT)
    bases = {f"lycoris_{name.replace('.', '_')}": tensor.numpy().copy() for name, tensor in model.named_parameters()}
    if case != "dora":  # W + ΔW − W would round ΔW to the bits of W
        for parameter in model.parameters():
            parameter.zero_()
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), model)
    found = {}
    for lora in network.loras:
        found |= added(torch, lora)
    assert found.keys() == adapter.keys()
    for key, theirs in found.items():
        update = as_torch(adapter[key], theirs.shape)
        base = bases[key.replace(".weight", "_weight")] if "magnitude" in update else None
        ours = update.delta() if base is None else update.apply(base) - base
        assert relative_error(theirs, ours) <= 1e-6, key


def test_a_scale_that_float32_does_not_hold_is_read_back_to_the_last_bit(tmp_path):
    adapter = written("pairs")
    save(adapter, tmp_path / "a.safetensors", LAYOUT)
    again = lf.load(tmp_path / "a.safetensors")
    assert {key: update.scale for key, update in again.items()} == {k: u.scale for k, u in adapter.items()}
    dtypes = {
        name.split(".")[0]: t.dtype for name, t in load_file(tmp_path / "a.safetensors").items() if "alpha" in name
    }
    assert dtypes["lycoris_to_q"] == np.float32
    assert dtypes["lycoris_line"] == np.float64


@pytest.mark.parametrize("ending", ["pt", "ckpt"])
def test_a_file_of_torch_save_is_read_as_its_safetensors_are(ending, torch, tmp_path):
    from safetensors.torch import load_file as load_torch

    torch.save(load_torch(file_of("locon_bf16")), tmp_path / f"a.{ending}")  # as sd-scripts saves what ends so
    ours, wanted = lf.load(tmp_path / f"a.{ending}"), loaded("locon_bf16")
    assert lf.digest(ours) == lf.digest(wanted)


# diffusers: kohya's names of the tiny U-Net, its pipeline's own loader.


@pytest.fixture(scope="module")
def diffusers(torch):
    return pytest.importorskip("diffusers", reason="pip install 'loraformat[peers]'")


def diffusers_deltas(diffusers, path):
    """Mangled module name → ΔW that the adapted U-Net computes."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    config = json.loads((PIPELINE / "unet" / "config.json").read_text())
    unet = diffusers.UNet2DConditionModel.from_config(config)
    state, alphas = Loader.lora_state_dict(str(path))
    Loader.load_lora_into_unet(state, alphas, unet, adapter_name="a")
    return {
        f"lora_unet_{name.replace('.', '_')}.weight": module.get_delta_weight("a").detach().float().numpy()
        for name, module in unet.named_modules()
        if hasattr(module, "lora_A") and "a" in module.lora_A
    }


def test_diffusers_loads_what_is_written_and_computes_its_numbers(diffusers, tmp_path):
    # diffusers 0.42.1 finds no module for the alpha of an attention's projection unless all of them have the same.
    def scaled(number, key, update):
        rule = ("factor", "alpha/r", "alpha/sqrt(r)")[number % 3]
        alpha, rule = (0.7, "alpha/sqrt(r)") if "_attn" in key else (0.1 * (number + 1), rule)
        part = replace(update["lora"], alpha=alpha, scale_rule=rule)
        return replace(update, parts=(replace(part, lora_A=part.lora_A.astype(np.float32)),))

    golden = [(key, update) for key, update in loaded("sd15").items() if key.startswith("lora_unet_")]
    targets = {key: scaled(n, key, update) for n, (key, update) in enumerate(golden)}
    adapter = lf.Adapter(targets, "kohya")
    save(adapter, tmp_path / "a.safetensors", LAYOUT)
    theirs = diffusers_deltas(diffusers, tmp_path / "a.safetensors")
    assert theirs.keys() == adapter.keys()
    for key, wanted in theirs.items():
        assert relative_error(wanted, as_torch(adapter[key], wanted.shape).delta()) <= 1e-6, key


def test_diffusers_reads_the_golden_of_sd_scripts_as_we_do(diffusers):
    adapter, theirs = loaded("sd15"), diffusers_deltas(diffusers, file_of("sd15"))
    assert theirs.keys() == {key for key in adapter if key.startswith("lora_unet_")}
    for key, wanted in theirs.items():
        assert relative_error(wanted, as_torch(adapter[key], wanted.shape).delta()) <= 1e-6, key


def test_what_is_written_opens_in_the_reference_reader_with_its_header(tmp_path):
    lf.convert(file_of("sd15"), tmp_path / "b.safetensors", to_layout="kohya")
    with safe_open(tmp_path / "b.safetensors", "np") as again, safe_open(file_of("sd15"), "np") as before:
        assert again.metadata() == before.metadata()
