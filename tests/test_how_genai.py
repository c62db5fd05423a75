"""The code for ONNX Runtime GenAI: it generates, and where GenAI would run another model or lack an input, there is none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from test_how import attached, changed, printed  # noqa: F401  (a fixture)
from test_onnx_optimised import built, llama  # noqa: F401  (fixtures)

from loraformat.base import Options
from loraformat.registry import load, open_base
from loraformat.verbs.bind import bind
from loraformat.verbs.merge import merge, prepare


def configured(folder, filename, **more):
    """The configuration that GenAI reads; what a model is for lies at different depths."""
    parts = {"decoder": {"pipeline": [{"embeddings": {"filename": "e.onnx"}}, {"lm": {"filename": filename}}]}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {**parts, **more}}))


@pytest.mark.parametrize(
    ("stated", "length"), [({}, 200), ({"context_length": 16}, 16), ({"context_length": 4096}, 200)]
)
def test_a_model_of_genai_is_run_by_genai(run, attached, tmp_path, stated, length):  # noqa: F811
    configured(tmp_path, "out.onnx", **stated)
    code = printed(run, attached, "genai")
    compile(code, "code", "exec")
    assert "model = og.Model('.')" in code
    assert f"max_length={length})" in code


def refused(run):
    told = run("info", "out.onnx", "--how", "genai")
    assert (told.code, told.out) == (2, "")
    return told.err


def test_a_model_that_is_none_of_genais_is_told_so(run, attached):  # noqa: F811
    assert "out.onnx is no model of ONNX Runtime GenAI: no genai_config.json lies beside it" in refused(run)


def test_a_model_beside_the_one_that_genai_would_run_has_no_code(run, attached, tmp_path):  # noqa: F811
    configured(tmp_path, "model.onnx")
    assert "genai_config.json names e.onnx, model.onnx, not out.onnx" in refused(run)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model": []}', '{"model": {"decoder": 1}}', '{"filename": "out.onnx"}']
)
def test_a_configuration_without_models_is_told_so(run, attached, tmp_path, text):  # noqa: F811
    (tmp_path / "genai_config.json").write_text(text)
    assert re.search("names no model, not out.onnx|is no JSON", refused(run))


@pytest.mark.parametrize(
    ("mode", "missing"), [(("swap", "--slots", "required"), "lora/w/A"), (("stack", "--rows", "x"), "lora.index")]
)
def test_inputs_that_genai_does_not_feed_have_no_code(run, tmp_path, mode, missing):
    assert run(*changed(tmp_path, "--mode", *mode)).code == 0
    configured(tmp_path, "out.onnx")
    assert f"{missing} would be missing" in refused(run)


@pytest.mark.peer
@pytest.mark.slow
def test_what_is_printed_generates_with_the_adapter_of_a_swap(run, llama, built, tmp_path):  # noqa: F811
    """The words of the merged model; without the line that makes the adapter active those of the base."""
    adapter, base = bind(load(llama.adapter), open_base(llama.checkpoint)), open_base(built("fp32") / "model.onnx")
    at = {name: shutil.copytree(built("fp32"), tmp_path / name) / "model.onnx" for name in ("base", "swap", "merged")}
    base.apply(prepare("attach", [("style", adapter)], base, Options(at["swap"], "swap")), force=True)
    merge(adapter, base, at["merged"], force=True)

    def said(name, without="nothing"):
        code = re.sub(rf".*{without}.*\n", "", printed(run, at[name], "genai"))
        done = subprocess.run(
            [sys.executable, "-c", code.replace("Once upon a time", "at")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said("swap") == said("merged")
    assert said("swap", "set_active_adapter") == said("base")
    assert said("base") != said("merged")
