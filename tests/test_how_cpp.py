"""The C++ that ``info --how cpp`` prints is compiled and run: an adapter that it makes active acts, and without it the base does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import updates
from graphs import adapter, lora, model, save, session
from test_how import attached, of_every_type, printed  # noqa: F401  (fixtures)

from loraformat import Adapter, Placement
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare

pytestmark = pytest.mark.peer

PLACES = (os.environ.get("ONNXRUNTIME_INCLUDE"), Path(__file__).parents[1] / ".onnxruntime", "/usr/include/onnxruntime")
LIBRARY = Path(onnxruntime.__file__).parent / "capi"


@pytest.fixture
def cpp(tmp_path):
    """(code) → what it prints: with the library of the installed wheel, whose headers are Debian's."""
    found = (Path(place) for place in PLACES if place and Path(place, "onnxruntime_cxx_api.h").is_file())
    headers, compiler = next(found, None), shutil.which("c++")
    if headers is None or compiler is None:
        pytest.skip("needs c++ and ONNX Runtime's headers: bash tests/onnxruntime_headers.sh .onnxruntime")
    asked = int(re.search(r"#define ORT_API_VERSION (\d+)", (headers / "onnxruntime_c_api.h").read_text())[1])
    if asked > int(onnxruntime.__version__.split(".")[1]):
        pytest.skip(f"the headers are of ONNX Runtime 1.{asked}, the library is {onnxruntime.__version__}")
    (tmp_path / "lib").mkdir()
    (library,) = LIBRARY.glob("libonnxruntime.so.1.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / "lib" / name).symlink_to(library)

    def runner(code):
        (tmp_path / "run.cpp").write_text(code)
        words = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "run.cpp", "-isystem", headers, "-o", "run"]
        words += ["-L", "lib", "-lonnxruntime", f"-Wl,-rpath,{tmp_path / 'lib'}"]
        for step in (words, ["./run"]):
            done = subprocess.run(step, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return [line.split(" ", 1) for line in done.stdout.splitlines()]

    return runner


def test_it_runs_an_attached_model(run, cpp, attached):  # noqa: F811
    assert cpp(printed(run, attached, "cpp")) == [["y", "1 8 5"]]


def test_it_feeds_every_dtype_as_it_is(run, cpp, of_every_type):  # noqa: F811
    lines = dict(line if len(line) == 2 else [*line, ""] for line in cpp(printed(run, of_every_type, "cpp")))
    assert lines.pop("out_scalar") == ""
    assert lines.pop("out_longer") == "1 16"
    assert set(lines.values()) == {"1 2"}
    assert len(lines) == 12


VALUES = """\
  for (size_t i = 0; i < outputs[0].GetTensorTypeAndShapeInfo().GetElementCount(); i++)
    std::cout << "value " << outputs[0].GetTensorData<float>()[i] << '\\n';
}
"""
TEXT = """g (float[N,5] x) => (float[N,4] y) <float[5,7] w, float[7,4] v, float[7] b>
  { ["/m/q/MatMul"] h = MatMul(x, w)  a = Add(h, b)  ["/m/v/MatMul"] y = MatMul(a, v) }"""


def test_the_adapter_of_a_swap_acts_where_it_is_active(run, cpp, tmp_path):
    """A pair and a DoRA, by LoraAdapter; the one line that makes it active is left out for the base."""
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    dora = updates.made("dora", Placement((7, 5), (0,), (1,)))
    given = Adapter({"m.q.weight": dora, **adapter({"m.v.weight": lora(4, 7, rank=3)})})
    base.apply(prepare("attach", [("style", given)], base, Options(tmp_path / "out.onnx", "swap")))
    merge(given, base, tmp_path / "merged.onnx")
    code = printed(run, "out.onnx", "cpp")
    assert "out.style.onnx_adapter" in code
    without = re.sub(r".*AddActiveLoraAdapter.*\n", "", code)
    assert without != code
    x = {"x": np.ones((1, 5), np.float32)}
    truths = [session(tmp_path / f"{name}.onnx").run(None, x)[0].reshape(-1) for name in ("merged", "base")]
    assert relative_error(*truths) > 0.1
    for program, wanted in zip((code, without), truths, strict=True):
        lines = cpp(program.rstrip().removesuffix("}") + VALUES)
        assert lines[0] == ["y", "1 4"]
        found = np.array([float(value) for name, value in lines[1:] if name == "value"])
        assert relative_error(found, wanted) <= 1e-5
