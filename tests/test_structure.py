"""The house stands as designed: who imports whom, what a command loads, and that rules and code name the same ids."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft_goldens import adapter_of

import loraformat as lf
from loraformat import registry
from loraformat.rules import RULES

ROOT = Path(__file__).parents[1]
CORE = ROOT / "loraformat"
CONVERTERS = ROOT / "converters" / "loraformat_converters"

# A module may import only modules to its left.
ORDER = (
    *(
        "errors",
        "blas",
        "names",
        "axes",
        "scale",
        "parts",
        "products",
        "magnitudes",
        "updates",
        "turned",
        "packed",
        "adapter",
    ),
    *("naming", "naming.links", "naming.spaces", "naming.templates"),
    *("algebra", "algebra.sides", "algebra.lowrank", "algebra.svd", "algebra.factors"),
    *(
        "canonical",
        "mapped",
        "ranges",
        "pieced",
        "dtypes",
        "container",
        "serializer",
        "progress",
        "shapes",
        "values",
        "metadata",
        "faults",
        "parse",
        "rules",
    ),
    *("identity", "unpacked", "stopping", "locks", "journal", "outputs", "temporaries", "atomic", "file", "folders"),
    *("pickled", "pickled.machine", "pickled.tensors", "pickled.archive", "pickled.stream", "pickled.file"),
    *("pickled.index", "pickled.distributed", "pickled.write"),
    *("source", "memory", "layout", "gathered", "loose", "plain_yaml", "base", "apart", "loaders", "walk", "registry"),
    *(
        "resolve",
        "strength",
        "placing",
        "huggingface",
        "quantised",
        "rounding",
        "tiles",
        "plan",
        "parted",
        "description",
    ),
    *("patch", "checkpoint.requantised"),
    *("checkpoint.eight_bits", "checkpoint.four_bits", "checkpoint.gptq"),
    *(
        "checkpoint.change",
        "checkpoint.survival",
        "checkpoint.shard",
        "checkpoint.safetensors",
        "checkpoint.torch",
        "checkpoint.folder",
    ),
    *(
        "checkpoint.grids",
        "checkpoint.places",
        "checkpoint.tied",
        "checkpoint.merging",
        "checkpoint.texts",
        "checkpoint.task",
        "checkpoint.output",
    ),
    *("checkpoint.base", "checkpoint", "checkpoint.pipeline", "normal"),
    "algebra.truncated",
    *(
        "sketch",
        "likeness",
        "bound",
        "naming.recognised",
        "naming.cut",
        "naming.fuse",
        "naming.stacked",
        "naming.made",
        "naming.transposed",
        "naming.translate",
        "naming.decoders",
        "algebra.refactored",
    ),
    *("algebra.randomised", "extracting", "extracting.counterparts", "extracting.linears", "extracting.others"),
    *("combining", "combining.weights", "combining.terms", "combining.entries", "combining.methods"),
    *("combining.settings", "combining.peft", "combining.beside"),
    *("combining.agree", "combining.notes", "combining.absolutes", "combining.finite"),
    *(
        "verbs",
        "verbs.merge",
        "verbs.bind",
        "verbs.init",
        "verbs.graph",
        "verbs.extract",
        "verbs.compare",
        "verbs.diff",
        "verbs.anatomy",
        "verbs.cause",
        "verbs.numbers",
        "verbs.touched",
        "verbs.verify",
        "verbs.adapt",
        "verbs.retarget",
        "verbs.convert",
    ),
    *("spans", "pages.html", "pages.style", "pages.facts", "pages.heat", "pages.spectra", "pages.page", "pages"),
    *(
        "verbs.validate",
        "verbs.combine",
        "verbs.resize",
        "verbs.recipe",
        "testing.adapters",
        "testing.strategies",
        "testing",
    ),
    *(
        "cli",
        "cli.options",
        "cli.printing",
        "cli.progress",
        "cli.adapters",
        "cli.validate",
        "cli.bases",
        "cli.loadable",
        "cli.deep",
        "cli.info",
        "cli.layouts",
    ),
    *("cli.completion", "cli.retarget", "cli.create", "cli.check", "cli.proof", "cli.deploy", "cli.graph"),
    *("cli.combine", "cli.resize", "cli.extract", "cli.diff", "cli.report", "cli.main", "__main__"),
)
THIRD_PARTY = {"numpy", "ml_dtypes", "click", "regex", "rich", "threadpoolctl"}
HEAVY = {"torch", "onnx", "onnxruntime", "jax", "transformers", "peft", "safetensors"}


def dotted(path, root):
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


MODULES = {dotted(path, CORE): path for path in sorted(CORE.rglob("*.py"))}
SOURCES = [*CORE.rglob("*.py"), *CONVERTERS.rglob("*.py")]


def imports_of(path):
    """Every module that a file imports when it runs, in functions too; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def core_module(name):
    """The module of the core that an import means: the longest that exists."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def test_every_module_has_its_place_in_the_order():
    assert set(ORDER) == MODULES.keys() - {""}


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_left_of_it(module):
    used = {core_module(name) for name in imports_of(MODULES[module]) if name.split(".")[0] == "loraformat"}
    assert used - {""} <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", MODULES)
def test_the_core_imports_no_framework_and_no_converter(module):
    allowed = sys.stdlib_module_names | THIRD_PARTY | {"loraformat"}
    if module == "testing.strategies":  # for authors of layouts, who have it; nothing else imports it
        allowed |= {"hypothesis"}
    assert {name.split(".")[0] for name in imports_of(MODULES[module])} <= allowed


def test_a_layout_of_tensors_imports_no_framework_either():
    allowed = sys.stdlib_module_names | THIRD_PARTY | {"loraformat", "loraformat_converters"}
    allowed |= {"gguf"}  # a package of numpy alone, and only for models of quantised types
    for layout in ("diffusers", "gguf", "kohya", "litgpt", "loralib", "megatron", "mlx", "peft", "torchtune", "trtllm"):
        for path in (CONVERTERS / layout).glob("*.py"):
            assert {name.split(".")[0] for name in imports_of(path)} <= allowed, path


SHARED = {"jax_live": {"flax"}, "diffusers": {"peft"}}
"""A converter of live objects may read and name them as that of the same world's files does; diffusers' files are PEFT's
tensors under PEFT's configuration, spelt otherwise."""


def test_one_converter_does_not_import_another():
    for path in CONVERTERS.glob("*/*.py"):
        others = {n.split(".")[1] for n in imports_of(path) if n.startswith("loraformat_converters.")}
        assert others <= {path.parent.name} | SHARED.get(path.parent.name, set()), path


# What is loaded.


def loaded_by(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


NO_SCAN = """
import importlib.metadata, sys
def scan(*args, **kwargs): raise AssertionError("entry points were scanned")
importlib.metadata.entry_points = scan
"""
TELL = "print(*{name.partition('.')[0] for name in sys.modules})"


def test_importing_the_package_loads_not_even_numpy():
    assert not loaded_by(f"{NO_SCAN}import loraformat\n{TELL}") & (HEAVY | {"numpy", "click", "loraformat_converters"})


def test_info_of_a_native_file_loads_no_framework_and_scans_no_entry_points(tmp_path):
    lf.save(lf.load(adapter_of("linear")), tmp_path / "a.safetensors")
    code = f"{NO_SCAN}import atexit\natexit.register(lambda: {TELL})\nfrom loraformat.cli.main import main\nmain()"
    loaded = loaded_by(code, "info", str(tmp_path / "a.safetensors"))
    assert "numpy" in loaded
    assert not loaded & (HEAVY | {"loraformat_converters", "rich"})


def test_a_public_name_is_what_it_says_whatever_was_imported_before():
    everything = "".join(f"import loraformat.{module}\n" for module in ORDER)
    code = f"{everything}import sys, loraformat\nprint(*(n for n in loraformat.__all__ if not callable(getattr(loraformat, n))))"
    assert loaded_by(code) == set()


def test_every_public_name_exists():
    assert all(hasattr(lf, name) for name in lf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lf.lode


def test_an_entry_point_gives_the_same_object_whatever_was_imported_before():
    # what is live is of a framework, and no entry point; a maker of tables is a script
    paths = [p for p in CONVERTERS.glob("*/*.py") if not p.parent.name.endswith("_live") and p.name != "make.py"]
    everything = "".join(f"import loraformat_converters.{dotted(path, CONVERTERS)}\n" for path in paths)
    code = f"{everything}from loraformat import registry\nprint(*(type(o).__name__ for g in ('layouts', 'bases') for o in registry._loaded(f'loraformat.{{g}}')[0].values()))"
    assert "module" not in loaded_by(code)


# Rules.


def test_the_sources_name_exactly_the_rules_of_the_table():
    used = set()
    for path in SOURCES:
        if path.name == "rules.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"LF-\d{3}", node.value):
                used.add(node.value)
    assert used == RULES.keys()


def test_prose_in_the_sources_names_only_rules_that_exist():
    said = {rule for path in SOURCES for rule in re.findall(r"LF-\d{3}", path.read_text(encoding="utf-8"))}
    assert said <= RULES.keys()


# Plug-ins.


@pytest.fixture
def broken_plugin(monkeypatch):
    """An installed layout whose module does not exist."""
    whole = importlib.metadata.entry_points
    point = importlib.metadata.EntryPoint("broken", "no_such_module:layout", "loraformat.layouts")

    def points(*, group):
        return [*whole(group=group), *([point] if group == point.group else [])]

    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    monkeypatch.setattr(registry, "_loaded", functools.cache(registry._loaded.__wrapped__))


@pytest.mark.usefixtures("broken_plugin")
def test_a_plugin_that_does_not_import_breaks_no_other_layout():
    found = registry.layouts()
    assert {"native", "peft"} <= found.keys()
    assert "broken" not in found
    assert len(lf.load(adapter_of("linear"))) == 4


@pytest.mark.usefixtures("broken_plugin")
def test_a_plugin_that_does_not_import_is_named_where_no_layout_fits(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.load(tmp_path / "a.safetensors")
    assert [(p.rule, p.severity, p.where) for p in caught.value.problems][1:] == [("LF-704", "warning", "broken")]
    assert "no_such_module" in caught.value.problems[1].what
