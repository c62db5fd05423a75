"""Nets and their holes: a mutant changes one place of the real code, and the real check named beside it must turn red.

The checks are those of the goldens, or of small graphs that ONNX Runtime executes. A round trip would stay green under
most mutants: wrong in both directions is right.
"""

import pytest

import loraformat as lf
from loraformat_converters.peft import config


def net(checks, mutants):
    """Two tests: every check is green on the code as it is, and red on the mutants that are paired with it.

    ``checks``: name → function of a folder; ``mutants``: pairs of a function of ``monkeypatch`` and a check's name.
    """

    @pytest.mark.parametrize("name", checks)
    def green(name, tmp_path):
        checks[name](tmp_path)

    @pytest.mark.parametrize(("mutant", "name"), mutants, ids=lambda value: getattr(value, "__name__", value))
    def red(mutant, name, monkeypatch, tmp_path):
        config._compiled.cache_clear()
        mutant(monkeypatch)
        with pytest.raises((AssertionError, lf.LoraFormatError, pytest.fail.Exception)):
            checks[name](tmp_path)

    return green, red
