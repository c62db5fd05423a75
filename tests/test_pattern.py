"""Patterns out of a stranger's file mean what ``re`` makes of them, in a number of steps that is bounded."""

import re

import numpy as np
import pytest

from loraformat_converters.peft.pattern import LENGTH, Pattern

ATOMS = [
    "a", "b", ".", r"\.", r"\d", r"\W", "[ab]", "[^a]", "[a-c0-9]", r"[\w.]", "^", "$", r"\A", r"\Z", r"\b", r"\B",
    "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "(?i:A)", "(?s:.)", "(?m:^)", "(?:x1)",
]  # fmt: skip
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?", "{0,2}?"]


def expression(draw, depth):
    """A random expression of atoms, sequences, choices and repetitions."""
    kind = draw.integers(10) if depth else 0
    if kind < 3:
        return str(draw.choice(ATOMS))
    inner = [expression(draw, depth - 1) for _ in range(2)]
    if kind < 6:
        return "".join(inner)
    if kind < 8:
        return f"({inner[0]}|{inner[1] if draw.random() < 0.8 else ''})"
    return f"({inner[0]}){draw.choice(REPEATS)}"


@pytest.mark.parametrize("start", range(0, 4000, 1000))
def test_the_answer_is_that_of_re(start):
    for seed in range(start, start + 1000):
        draw = np.random.default_rng(seed)
        text = expression(draw, 3)
        name = "".join(draw.choice(list("aab.A1 bx\n"), size=draw.integers(10)))
        found, wanted = Pattern(text), re.compile(text)
        assert found.starts(name) == bool(wanted.match(name)), (text, name)
        assert found.fills(name) == bool(wanted.fullmatch(name)), (text, name)


@pytest.mark.parametrize("text", [r"(a)\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b|c)", "(?>a+)", "a++"])
def test_what_sets_of_positions_cannot_do_is_refused_by_name(text):
    with pytest.raises(ValueError, match="cannot be matched in bounded time"):
        Pattern(text)


@pytest.mark.parametrize(
    "text", ["(", "a{2,1}", "[", "*", "(?P<x>a)(?P<x>b)", "(" * 5000, "a" * (LENGTH + 1), "(?<=a*)b"]
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        Pattern(text)


def test_an_expression_that_needs_too_many_steps_says_how_many_there_are():
    with pytest.raises(ValueError, match="more than 100,000 steps on a name of 401 characters"):
        Pattern("((a*b|a)*c|a)*$").starts("a" * 400 + "!")


def test_a_repetition_of_a_repetition_needs_no_more_steps_than_the_name_is_long():
    pattern = Pattern("(a+)+$")
    assert pattern.starts("a" * 5000)
    assert not pattern.starts("a" * 5000 + "!")


def test_a_deep_nest_is_refused_in_words_or_matched():
    for depth in (50, 300, 900):
        try:
            assert Pattern("(?:" * depth + "a" + ")" * depth).fills("a")
        except ValueError as error:
            assert "deep" in str(error) or "recursion" in str(error)
