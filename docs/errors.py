"""Writes errors.md from the table of rules: ``python docs/errors.py > docs/errors.md``. A test holds the two together."""

from __future__ import annotations

from loraformat.rules import RULES

__all__ = ["page"]

_HEAD = """\
# What can be wrong

Every fault has a rule, whose id never changes its meaning. On a terminal it reads

    LF-602  the base has no tensor h.0.q.weight; nearest: h.0.q_proj.weight  @ h.0.q.weight
            if it goes by another name there: --names map.json with {"h.0.q.weight": "h.0.q_proj.weight"}
            and 11 more like it: h.1.q.weight, h.2.q.weight, h.3.q.weight…

the rule, what was found and what was expected, where, and below it what to do. `--json` has the same for a program, one
entry for each place: `{"rule", "severity", "where", "what", "fix"}`; in Python it is `LoraFormatError.problems`.

Exit code 1: the input is at fault, or a difference was found. 2: the command line is (LF-705 too). A *warning* fails
only with `--strict`. LF-713 is a fault of loraformat itself: please report it.
"""

_GROUPS = {
    "1": "The container: the file's bytes and its safetensors header",
    "2": "The metadata of a native file",
    "3": "Targets and their parts, in every layout",
    "4": "Placement and special parts",
    "5": "Layouts: reading and writing what other tools use",
    "6": "Bases: where an adapter goes",
    "7": "Files, arguments, limits",
}


def page() -> str:
    """The text of errors.md."""
    lines = [_HEAD]
    for digit, title in _GROUPS.items():
        rules = [rule for rule in RULES.values() if rule.id[3] == digit]
        lines += [f"\n## {title}\n"]
        if rules[0].of_file:
            lines += [
                "Stated with its reason in [the specification](../spec/loraformat.md), broken by a test vector.\n"
            ]
        lines += ["| rule | what must hold |", "|---|---|"]
        lines += [f"| {r.id}{' *warning*' if r.severity == 'warning' else ''} | {r.title} |" for r in rules]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
