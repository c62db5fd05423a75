"""The C++ and the C# that ``info --how`` prints are compiled and run: an adapter that they make active acts, and without it
the base does."""

from __future__ import annotations

import json
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
from test_how import attached, changed, hard_names, of_every_type, printed  # noqa: F401  (fixtures)

from loraformat import Adapter, Placement
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[1]
SOURCE, DOTNET = ROOT / ".onnxruntime", ROOT / ".dotnet"
HEADERS = (os.environ.get("ONNXRUNTIME_INCLUDE"), SOURCE / "include", "/usr/include/onnxruntime")
LIBRARY = Path(onnxruntime.__file__).parent / "capi"

# .NET without the system's ICU, and with its own OpenSSL: csc hashes by it.
ALONE = {"DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1", "LD_LIBRARY_PATH": str(DOTNET / "openssl")}
RUNTIME = {"name": "Microsoft.NETCore.App", "version": "3.1.0"}


def done(words, folder, **environment):
    """What a command prints, which must not fail."""
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def library(headers, *links):
    """Links to the library of the installed wheel, or a skip: one that is older than the headers has not all they name."""
    asked = int(re.search(r"#define ORT_API_VERSION (\d+)", (headers / "onnxruntime_c_api.h").read_text())[1])
    if asked > int(onnxruntime.__version__.split(".")[1]):
        pytest.skip(f"the headers are of ONNX Runtime 1.{asked}, the library is {onnxruntime.__version__}")
    (found,) = LIBRARY.glob("libonnxruntime.so.1.*")
    for link in links:
        link.symlink_to(found)


class Cpp:
    """With the headers that are at hand."""

    name = "cpp"
    values = """\
  for (size_t i = 0; i < outputs[0].GetTensorTypeAndShapeInfo().GetElementCount(); i++)
    std::cout << "value " << outputs[0].GetTensorData<float>()[i] << '\\n';
}
"""

    def __init__(self, folder):
        found = (Path(place) for place in HEADERS if place and Path(place, "onnxruntime_cxx_api.h").is_file())
        self.folder, self.headers, self.compiler = folder, next(found, None), shutil.which("c++")
        if self.headers is None or self.compiler is None:
            pytest.skip("needs c++ and ONNX Runtime's headers: make .onnxruntime")
        (folder / "lib").mkdir()
        library(self.headers, folder / "lib/libonnxruntime.so", folder / "lib/libonnxruntime.so.1")

    def run(self, code):
        (self.folder / "run.cpp").write_text(code)
        words = [self.compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "run.cpp", "-isystem", self.headers]
        words += ["-o", "run", "-L", "lib", "-lonnxruntime", f"-Wl,-rpath,{self.folder / 'lib'}"]
        done(words, self.folder)
        return done(["./run"], self.folder)

    def and_values(self, code):
        return code.rstrip().removesuffix("}") + self.values


class CSharp:
    """With ONNX Runtime's own C# and a compiler of C# 8."""

    name = "csharp"
    values = 'foreach (var value in outputs[0].GetTensorDataAsSpan<float>()) Console.WriteLine($"value {value:R}");\n'

    def __init__(self, folder, assembly):
        self.folder = folder
        (folder / assembly.name).symlink_to(assembly)
        (folder / "run.runtimeconfig.json").write_text(json.dumps({"runtimeOptions": {"framework": RUNTIME}}))
        library(SOURCE / "include", folder / "libonnxruntime.so")

    @staticmethod
    def compile(folder, *words):
        """``csc``, with everything that .NET has at hand."""
        (compiler,) = DOTNET.glob("sdk/*/Roslyn/bincore/csc.dll")
        known = [f"-r:{path}" for path in DOTNET.glob("packs/*/*/ref/*/*.dll")]
        done(
            [DOTNET / "dotnet", "exec", compiler, "-noconfig", "-nologo", "-nostdlib", *known, *words], folder, **ALONE
        )

    def run(self, code):
        """Statements at the top are C# 9's: here they are the body of the ``Main`` that C# 9 itself would make."""
        head = re.match(r"((//.*|using [\w.]+;)\n)*", code)[0]
        (self.folder / "run.cs").write_text(
            f"{head}class Program {{ static void Main(string[] args) {{\n{code[len(head) :]}}} }}\n"
        )
        api = "-r:Microsoft.ML.OnnxRuntime.dll"
        self.compile(self.folder, "-optimize+", "-nullable:enable", "-warnaserror", api, "-out:run.dll", "run.cs")
        return done([DOTNET / "dotnet", "exec", "run.dll"], self.folder, **ALONE)

    def and_values(self, code):
        return code + self.values


@pytest.fixture(scope="session")
def assembly(tmp_path_factory):
    """ONNX Runtime's C# for applications, compiled; the two words of C# 9 in it are said in C# 8."""
    if not list(SOURCE.glob("csharp/*.cs")) or not (DOTNET / "dotnet").is_file():
        pytest.skip("needs .NET and ONNX Runtime's C#, from npm and apt: make .dotnet .onnxruntime")
    folder = tmp_path_factory.mktemp("api")
    shutil.copytree(SOURCE / "csharp", folder, dirs_exist_ok=True)
    newer = folder / "ManagedProjections.shared.cs"
    text = re.sub(r"([\w<>]+) (\w+) = new\(", r"\1 \2 = new \1(", newer.read_text())
    newer.write_text(re.sub(r"\(([\w.]+) is not (\w+)\)", r"(!(\1 is \2))", text))
    out = folder / "Microsoft.ML.OnnxRuntime.dll"
    CSharp.compile(folder, "-target:library", "-unsafe", f"-out:{out}", *folder.glob("*.cs"))
    return out


@pytest.fixture(params=["cpp", "csharp"])
def language(request, tmp_path):
    if request.param == "cpp":
        return Cpp(tmp_path)
    return CSharp(tmp_path, request.getfixturevalue("assembly"))


def lines(language, code):
    return [line.partition(" ")[::2] for line in language.run(code).splitlines()]


def test_it_runs_an_attached_model(run, language, attached):  # noqa: F811
    assert lines(language, printed(run, attached, language.name)) == [("y", "1 8 5")]


def test_it_feeds_every_dtype_as_it_is(run, language, of_every_type):  # noqa: F811
    found = dict(lines(language, printed(run, of_every_type, language.name)))
    assert found.pop("out_scalar") == ""
    assert found.pop("out_longer") == "1 16"
    assert set(found.values()) == {"1 2"}
    assert len(found) == 12


def test_names_that_its_program_uses_are_no_trouble(run, language, hard_names):  # noqa: F811
    assert lines(language, printed(run, hard_names, language.name))[0] == ("y0", "1")


TEXT = """g (float[N,5] x) => (float[N,4] y) <float[5,7] w, float[7,4] v, float[7] b>
  { ["/m/q/MatMul"] h = MatMul(x, w)  a = Add(h, b)  ["/m/v/MatMul"] y = MatMul(a, v) }"""


@pytest.mark.parametrize("slots", ["optional", "required"])
def test_the_adapter_of_a_swap_acts_where_it_is_active(run, language, slots, tmp_path):
    """A pair and a DoRA, by LoraAdapter, in required slots too; of optional ones the line is left out for the base."""
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    dora = updates.made("dora", Placement((7, 5), (0,), (1,)))
    given = Adapter({"m.q.weight": dora, **adapter({"m.v.weight": lora(4, 7, rank=3)})})
    base.apply(prepare("attach", [("style", given)], base, Options(tmp_path / "out.onnx", "swap", slots=slots)))
    merge(given, base, tmp_path / "merged.onnx")
    code = printed(run, "out.onnx", language.name)
    assert "out.style.onnx_adapter" in code
    without = re.sub(r".*AddActiveLoraAdapter.*\n", "", code)
    assert without != code
    x = {"x": np.ones((1, 5), np.float32)}
    truths = [session(tmp_path / f"{name}.onnx").run(None, x)[0].reshape(-1) for name in ("merged", "base")]
    assert relative_error(*truths) > 0.1
    programs = (code, without) if slots == "optional" else (code,)
    for program, wanted in zip(programs, truths[: len(programs)], strict=True):
        told = lines(language, language.and_values(program))
        assert told[0] == ("y", "1 4")
        found = np.array([float(value) for name, value in told[1:] if name == "value"])
        assert relative_error(found, wanted) <= 1e-5


def test_the_adapters_of_a_stack_are_off_at_first(run, language, tmp_path):
    assert run(*changed(tmp_path, "--mode", "stack", "--rows", "x")).code == 0
    told = lines(language, language.and_values(printed(run, "out.onnx", language.name)))
    base = session(tmp_path / "m.onnx").run(None, {"x": np.ones((1, 3), np.float32)})[0]
    assert relative_error(np.array([[float(value) for name, value in told if name == "value"]]), base) <= 1e-5


def test_csharp_frees_what_it_fed(run, assembly, tmp_path):
    """ONNX Runtime pins the memory of what is fed until it is disposed of: nothing else frees it."""
    save(model("g (float[N] x) => (float[N] y) { y = Identity (x) }"), tmp_path / "m.onnx")
    code = printed(run, "m.onnx", "csharp").replace("N = 1;", "N = 5_000_000;")
    code += "feeds.Clear();\nConsole.WriteLine(GC.GetTotalMemory(true));\n"
    language = CSharp(tmp_path, assembly)
    assert int(language.run(code).split()[-1]) < 5e6
    assert int(language.run(re.sub(r".*\.Dispose\(\).*\n", "", code)).split()[-1]) > 20e6
