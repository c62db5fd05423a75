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


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    tests = (t for name in MODULES for t in doctest.DocTestFinder().find(importlib.import_module(name)))
    assert sum(bool(test.examples) for test in tests) >= 15
