"""What a terminal shows of many problems: each kind once, none of them lost."""

import re

import pytest

from loraformat.cli.printing import lines_of, table
from loraformat.errors import Problem


def test_a_fault_that_every_layer_has_is_told_once_with_the_first_layers():
    problems = [Problem("LF-602", f"no layers.{i}.q; nearest: h.{i}", f"layers.{i}.q", f"try h.{i}") for i in range(9)]
    (line,) = lines_of(problems)
    assert line.splitlines() == [
        "\x1b[31mLF-602\x1b[0m  no layers.0.q; nearest: h.0  @ layers.0.q",
        "        try h.0",
        "        and 8 more like it: layers.1.q, layers.2.q, layers.3.q…",
    ]


@pytest.mark.parametrize(
    "other",
    [
        Problem("LF-603", "no layers.1.q", "layers.1.q"),
        Problem("LF-602", "no layers.1.q", "layers.1.q", severity="warning"),
        Problem("LF-602", "too many layers.1.q", "layers.1.q"),
        Problem("LF-602", "no layers.1.q", "layers.1.k"),
    ],
)
def test_what_differs_in_more_than_numbers_is_told_apart(other):
    assert len(lines_of([Problem("LF-602", "no layers.0.q", "layers.0.q"), other])) == 2


def test_one_text_at_many_places_names_the_first_and_counts_all():
    lines = lines_of([Problem("LF-509", "no alpha", name, "give --alpha") for name in ("a", "b", "q.0", "k")])
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in lines] == [
        "LF-509  no alpha  @ a, b and 2 more\n        give --alpha"
    ]


def test_texts_that_some_layers_share_do_not_divide_the_layers():
    problems = [Problem("LF-611", f"{7 + i // 2} values differ", f"layers.{i}.q") for i in range(6)]
    (line,) = lines_of(problems)
    assert line.endswith("and 5 more like it: layers.1.q, layers.2.q, layers.3.q…")


def test_a_strangers_name_begins_no_line_of_its_own():
    (line,) = lines_of([Problem("LF-602", "no a\nb", "a\nb", "say\r\nit")])
    assert line.splitlines()[0].endswith("no a\\nb  @ a\\nb")
    assert line.splitlines()[1:] == ["        say\\r\\nit"]


def test_columns_are_as_wide_as_their_widest_cell():
    assert list(table([("a", "bbb", ""), ("aaa", "b", "c")])) == ["a    bbb", "aaa  b    c"]
