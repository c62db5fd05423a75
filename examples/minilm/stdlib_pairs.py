"""Pairs of (what a function does, which function it is) from the running standard library.

The query is the first sentence of a docstring, unchanged but for white space and the final stop;
the answer is the qualified name with the parameter names: ``os.path.commonpath(paths)``.
Everything is sorted and deduplicated by query, so one build of CPython always gives one list;
another version or platform gives a slightly different one.  The texts are the Python Software
Foundation's: see LICENSE.python.

    python stdlib_pairs.py     # print them
"""

import hashlib
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

# Modules that act when imported, are no API, double os.path, or (distutils) may be setuptools'.
SKIP = {
    "antigravity", "distutils", "ensurepip", "genericpath", "idlelib", "lib2to3", "ntpath",
    "pydoc_data", "test", "this", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
PUBLIC_NAME = {"builtins": "", "posix": "os.", "posixpath": "os.path."}


class Pair(NamedTuple):
    """A query, its answer, and whether the answer is a method of a class."""

    query: str
    answer: str
    is_method: bool

    @property
    def digest(self) -> int:
        """A number that depends on the query alone: the source of all splits."""
        return int(hashlib.sha256(self.query.encode()).hexdigest(), 16)


def stdlib_modules() -> Iterator[ModuleType]:
    """Public standard library modules and their direct public submodules, where importable."""
    for name in sorted(sys.stdlib_module_names - SKIP):
        module = import_public(name)
        if module:
            yield module
            for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
                submodule = import_public(name, child.name)
                if submodule:
                    yield submodule


def import_public(*path: str) -> ModuleType | None:
    """The module of that dotted path; None for private and missing ones."""
    if path[-1].startswith("_"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(".".join(path))
    except ImportError:  # not built for this platform
        return None


def routines(module: ModuleType) -> Iterator[tuple[str, Any, bool]]:
    """Public functions and methods the module itself defines: (name, object, is it a method)."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isroutine(value):
            yield name, value, False
        elif inspect.isclass(value):
            for method, body in sorted(vars(value).items()):
                if inspect.isroutine(body) and not method.startswith("_"):
                    yield f"{name}.{method}", body, True


def summary(routine: Any) -> str:
    """First sentence of the docstring."""
    first_paragraph = " ".join((inspect.getdoc(routine) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)])\. ", first_paragraph)[0].rstrip(".:")


def parameters(routine: Any) -> str:
    """Parameter names, where the interpreter knows them."""
    try:
        names = inspect.signature(routine).parameters
    except (TypeError, ValueError):
        return ""
    return ", ".join(name for name in names if name not in ("self", "cls"))


def stdlib_pairs() -> list[Pair]:
    """All pairs of 4 to 20 words whose query does not give the name of the function away."""
    pairs: dict[str, Pair] = {}
    for module in stdlib_modules():
        owner = PUBLIC_NAME.get(module.__name__, f"{module.__name__}.")
        for name, routine, is_method in routines(module):
            query = summary(routine)
            gives_away = name.rsplit(".")[-1].lower() in re.findall(r"\w+", query.lower())
            if 4 <= len(query.split()) <= 20 and "->" not in query and not gives_away:
                answer = f"{owner}{name}({parameters(routine)})"
                pairs.setdefault(query, Pair(query, answer, is_method))
    return [pairs[query] for query in sorted(pairs)]


if __name__ == "__main__":
    for pair in stdlib_pairs():
        print(f"{pair.answer}\t{pair.query}")
