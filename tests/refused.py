"""What a call that must be refused says."""

from __future__ import annotations

import pytest

import loraformat as lf

__all__ = ["faults_of", "problems_of", "refusal", "rules_of"]


def problems_of(call, *args, **kwargs):
    """All of them."""
    with pytest.raises(lf.LoraFormatError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def rules_of(call, *args, **kwargs):
    """The set of their rules."""
    return {problem.rule for problem in problems_of(call, *args, **kwargs)}


def faults_of(call, *args, **kwargs):
    """The set of their (rule, where)."""
    return {(problem.rule, problem.where) for problem in problems_of(call, *args, **kwargs)}


def refusal(call, *args, **kwargs):
    """(the set of their rules, all that they say)."""
    problems = problems_of(call, *args, **kwargs)
    return {problem.rule for problem in problems}, str(lf.LoraFormatError(problems))
