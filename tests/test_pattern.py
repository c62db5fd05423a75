"""Patterns out of a stranger's file mean what ``re`` makes of them, in a time that is bounded."""

import re
import time

import numpy as np
import pytest

from loraformat_converters.peft.pattern import LENGTH, Pattern

ATOMS = [
    "a", "b", ".", r"\.", r"\d", r"\W", "[ab]", "[^a]", "[a-c0-9]", r"[\w.]", "^", "$", r"\A", r"\Z", r"\b", r"\B",
    "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "(?i:A)", "(?s:.)", "(?m:^)", "(?:x1)", "(?>a+)", r"\{", "[{}]",
]  # fmt: skip
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{2,}", "{,2}", "*?", "+?", "{0,2}?", "++"]


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


def test_the_answer_is_that_of_re():
    for seed in range(3000):
        draw = np.random.default_rng(seed)
        text = expression(draw, 3)
        name = "".join(draw.choice(list("aab.A1 bx{"), size=1 + draw.integers(9)))  # a module's path is never empty
        found, wanted = Pattern(text), re.compile(text)
        assert found.starts(name) == bool(wanted.match(name)), (text, name)
        assert found.fills(name) == bool(wanted.fullmatch(name)), (text, name)


@pytest.mark.parametrize("text", [r"(a.)\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b|c)"])
def test_references_to_what_was_matched_mean_what_they_mean_to_re(text):
    for name in ("abab", "aa", "ab", "c", "b", "abac"):
        assert Pattern(text).fills(name) == bool(re.fullmatch(text, name)), (text, name)


@pytest.mark.parametrize(
    "text",
    [
        *("(", "a{2,1}", "[", "*", "(?P<x>a)(?P<x>b)", "(" * 5000, "a" * (LENGTH + 1), "(?<=a*)b", r"\p{L}", r"(?R)"),
        *("(a){e}", "a{e<=1}", "a{", "{", "[[a]", "[a--b]", "(?V1)a", r"\L<x>", "(?|a|b)"),
    ],
)
def test_what_re_does_not_read_or_reads_in_another_way_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        Pattern(text)


def test_an_expression_that_needs_too_long_is_named_with_the_time_that_it_had():
    start = time.process_time()
    with pytest.raises(ValueError, match=r"'\(a\|aa\)\+\\\\1c' needs more than 0\.25 s on a name of 60 characters"):
        Pattern(r"(a|aa)+\1c").starts("a" * 60)
    assert time.process_time() - start < 5


def test_a_deep_nest_is_refused_in_words_or_matched():
    for depth in (50, 300, 900):
        try:
            assert Pattern("(?:" * depth + "a" + ")" * depth).fills("a")
        except ValueError as error:
            assert "deep" in str(error) or "recursion" in str(error)
