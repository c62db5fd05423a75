"""The README tells the truth: every command line in it runs, every option is in it, every name in its Python exists."""

import io
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from graphs import adapter, lora, model, save
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry
from loraformat.cli.main import _VERBS, cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LINES = [
    line.removeprefix("$ ").partition("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ") and "loraformat " in line and not line.startswith(("$ pip", "$ git"))
]


@pytest.fixture
def files(run, tmp_path):
    """What the README's commands name, small: two adapters, a checkpoint, an ONNX model, uploads."""
    names = [f"model.layers.0.self_attn.{leaf}.weight" for leaf in ("q_proj", "v_proj")]
    made = model(
        """g (float[N, 7] x) => (float[N, 11] y) <float[7, 5] q, float[5, 11] v> { h = MatMul (x, q)  y = MatMul (h, v) }"""
    )
    for node, tensor, name in zip(made.graph.node, made.graph.initializer, names, strict=True):
        node.input[1] = tensor.name = name
    save(made, tmp_path / "model.onnx")
    targets = dict(zip(names, ((5, 7), (11, 5)), strict=True))
    lf.save(adapter({name: lora(*shape, seed=1) for name, shape in targets.items()}), tmp_path / "a.safetensors")
    lf.save(adapter({names[0]: lora(5, 7, seed=2)}), tmp_path / "style.lora.safetensors")
    assert run("convert", "a.safetensors", "my-peft-adapter").code == 0
    (tmp_path / "base").mkdir()
    draw = np.random.default_rng(3)
    weights = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in targets.items()}
    save_file(weights, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (tmp_path / "uploads").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "uploads/a.safetensors")


def test_there_are_command_lines():
    assert len(LINES) >= 15
    assert {shlex.split(line.rpartition("| ")[2])[1] for line in LINES} == set(_VERBS)


@pytest.mark.usefixtures("files")
def test_every_command_line_runs_one_after_the_other(run, monkeypatch, tmp_path):
    for line in LINES:
        before, _, command = line.rpartition("| ")
        if before:
            (source,) = re.findall(r"cat (\S+)", before)
            data = (tmp_path / source).read_bytes()
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        told = run(*shlex.split(command)[1:])
        assert told.code == 0, (line, told.out, told.err)


def test_every_command_and_every_option_is_in_the_table():
    rows = dict(re.findall(r"^\| `([a-z]+)[^`]*` \|(.*)\|$", README.partition("## Commands")[2], re.MULTILINE))
    assert rows.keys() == set(_VERBS)
    for verb in _VERBS:
        command = cli.get_command(click.Context(cli), verb)
        options = {name for parameter in command.params for name in parameter.opts if name.startswith("-")}
        wanted = f"{verb} has {', '.join(f'`{name}`' for name in sorted(options))}"
        assert set(re.findall(r"`(-[^`]*)`", rows[verb])) == options, wanted


def test_the_table_of_layouts_has_every_layout_that_is_installed():
    table = README.partition("| layout |")[2].partition("\n\n")[0].lower()
    assert {name for name in registry.layouts() if f"**{name.replace('native', 'loraformat')}" not in table} == set()


@pytest.mark.usefixtures("files")
def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(import loraformat.*?)```", README, re.DOTALL)
    config = json.loads(Path("my-peft-adapter/adapter_config.json").read_text())
    names = {"tensors": load_file("my-peft-adapter/adapter_model.safetensors"), "config": config}
    exec(code, names)
    assert names["result"].valid
    assert lf.load("fresh.lora.safetensors").keys() == names["adapter"].keys()
