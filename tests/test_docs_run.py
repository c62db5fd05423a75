"""Every block of commands and of Python in the README and the pages of docs/ runs, on what PEFT, torch and sd-scripts made."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import numpy as np
import onnxruntime
import pytest
import torch
from exports import llama
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat.verbs.merge import attach

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (page, language, text)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for language, text in re.findall(
        r"^```(console|sh|python|py|bash)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S
    )
]
PYTHON = [(page, text) for page, language, text in BLOCKS if language in ("python", "py")]

SKIPPED = {
    "pip install": "installs what is installed, from an index",
    "git clone": "the address is not in it",
    "make demo": "sets up anew; test_minilm runs what it runs",
    "make test": "is this",
    "--base flux1-dev.safetensors": "the file has 24 GB; test_image_spaces has the names of all its tensors",
}
"""What a line that is not run has in it, and why it is not."""


def lines(language):
    """The commands of the blocks of one language, in order."""
    prompt = "$ " if language == "console" else ""
    every = [line for _, found, text in BLOCKS if found == language for line in text.splitlines()]
    told = [line.removeprefix(prompt) for line in every if line.startswith(prompt)]
    return [line for line in told if not any(word in line for word in SKIPPED)]


def tuned(model, seed, targets, rank):
    """PEFT's own layers in the model, with values in them."""
    torch.manual_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    ).eval()


class Tokens(torch.nn.Module):
    """A language model of nothing but tokens."""

    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        return self.m(input_ids=x, attention_mask=torch.ones_like(x)).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the pages name: a Llama, exported and as a checkpoint, and two adapters that PEFT saved."""
    home = tmp_path_factory.mktemp("made")
    torch.manual_seed(1)
    model = Tokens(llama(tied=False).m).eval()
    tokens = torch.randint(0, 61, (3, 5))
    model.m.save_pretrained(home / "base")
    axes = {"x": {0: "rows"}}
    torch.onnx.export(model, (tokens,), str(home / "model.onnx"), dynamo=False, input_names=["x"], dynamic_axes=axes)
    for name, seed, targets in (("my-peft-adapter", 2, ["q_proj", "v_proj"]), ("style", 3, ["q_proj"])):
        adapted = tuned(model.m, seed, targets, 4)
        adapted.save_pretrained(home / name)
        model.m = adapted.unload()
    lf.save(lf.load(home / "style"), home / "style.lora.safetensors")
    shutil.rmtree(home / "style")
    (home / "uploads").mkdir()
    lf.save(lf.load(home / "my-peft-adapter"), home / "uploads" / "a.safetensors")
    return home


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with all of it."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def shell(commands):
    """One after the other, by a shell, with the installed script's name for this Python's."""
    tool = f'loraformat() {{ "{sys.executable}" -m loraformat "$@"; }}\nset -o pipefail\n'
    for line in commands:
        done = subprocess.run(["bash", "-c", tool + line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout, done.stderr)


@pytest.mark.usefixtures("here")
def test_every_command_line_of_the_pages_runs_one_after_the_other():
    commands = lines("console")
    assert len(commands) >= 30
    shell(commands)


def test_the_renaming_commands_run(here):
    """In a folder of their own, where the names are those of another story."""
    story = here / "story"
    story.mkdir()
    # sd-scripts' file of a small U-Net; what a Stable Diffusion has not is left out.
    kohya = load_file(ROOT / "tests/golden/kohya/sd15/adapter.safetensors")
    known = {name: values for name, values in kohya.items() if "up_blocks_0_attentions" not in name}
    save_file(known, story / "style.safetensors")
    lf.save(lf.load(here / "my-peft-adapter"), story / "my.lora.safetensors")
    for name in ("old", "new"):
        shutil.copytree(here / "base", story / name)
    moved = {f"language_model.{k}": v for k, v in load_file(here / "base" / "model.safetensors").items()}
    save_file(moved, story / "new" / "model.safetensors", {"format": "pt"})
    commands = lines("sh")
    assert len(commands) == 2
    shell([f"cd story && {line}" for line in commands])
    renamed = lf.load(story / "new.lora.safetensors")
    assert all(key.startswith("language_model.model.layers.") for key in renamed)


def live_torch(here):
    model = llama(tied=False).m.eval()
    return {"peft_model": tuned(llama(tied=False).m, 4, ["q_proj"], 2), "model": model}


def live_jax(here):
    linen, jnp = pytest.importorskip("flax.linen"), pytest.importorskip("jax.numpy")
    import jax

    from loraformat_converters import jax_live

    model, x = linen.Dense(5), jnp.ones((3, 7))
    params = model.init(jax.random.key(0), x)
    draw = np.random.default_rng(1)
    place = lf.Placement((7, 5), (1,), (0,))
    pair = lf.Lora(*(draw.standard_normal(shape, np.float32) for shape in ((2, 7), (5, 2))), 3.0, "alpha/r")
    adapter = lf.Adapter({"kernel": lf.Update((pair,), place)}, names="flax")

    trained = jax_live.branch(params, adapter).factors
    names = {"jax": jax, "lf": lf, "model": model, "params": params, "x": x, "adapter": adapter, "trained": trained}
    return {**names, "loss": lambda branched: branched(model.apply, x).sum()}


def running(here):
    mine, style = lf.load("my-peft-adapter"), lf.load("style.lora.safetensors")
    both = {"style": style, "tone": mine}
    attach(both, lf.open_base("model.onnx"), "swap.onnx", mode="swap")
    attach(both, lf.open_base("model.onnx"), "stack.onnx", mode="stack", rows=("x",))
    feeds = {"x": np.ones((3, 5), np.int64)}
    return {"tone": mine, "feeds": feeds, "rows": feeds}


def library(here):
    config = json.loads(Path("my-peft-adapter/adapter_config.json").read_text())
    return {"tensors": load_file("my-peft-adapter/adapter_model.safetensors"), "config": config}


NAMES = {
    "jax_live": live_jax,
    "torch_live": live_torch,
    "onnx.runtime": running,
    "onnx.effective": running,
    "import loraformat as lf": library,
}
"""What a block imports → what gives the names that it does not make itself."""


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_a_block_of_python_runs(page, text, here):
    (given,) = [names for word, names in NAMES.items() if word in text]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        text = text.replace("CUDAExecutionProvider", "CPUExecutionProvider")
    names = given(here)
    try:
        exec(compile(text, str(page), "exec"), names)
    except Exception as error:
        raise AssertionError(f"{page.name}:\n{indent(text, '    ')}") from error


def test_what_is_left_out_is_there():
    every = "".join(text for _, _, text in BLOCKS)
    assert [word for word in SKIPPED if word not in every] == []
