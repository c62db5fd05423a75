"""The examples in the docstrings give what they show."""

import doctest
import importlib
import pkgutil

import pytest

import loraformat
import loraformat_converters

MODULES = [
    m.name for p in (loraformat, loraformat_converters) for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")
]


FRAMEWORKS = {"torch", "jax", "transformers"}


def imported(name):
    """The module; None where it is of a framework that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in FRAMEWORKS:
            raise
        return None


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name):
    if (module := imported(name)) is None:
        pytest.skip("needs a framework")
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    tests = (t for module in filter(None, map(imported, MODULES)) for t in doctest.DocTestFinder().find(module))
    assert sum(bool(test.examples) for test in tests) >= 15
