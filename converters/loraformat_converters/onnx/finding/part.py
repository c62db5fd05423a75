"""A part: one of several graphs that together are one model, such as an encoder and a decoder.

A part holds some of the targets only, and may name its modules from a root of its own: ``encoder_model.onnx`` calls
``encoder.block.0`` ``block.0`` (optimum-onnx 0.1). So no rule can be asked to serve all targets here. The part's file
name is the evidence instead: a word in it that the other files' names lack, as a component of the target's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from loraformat_converters.onnx.finding.align import Alignment, rules_of, told, under

__all__ = ["Part", "parts"]


@dataclass(frozen=True)
class Part:
    """What the name of a part's file says.

    Attributes:
        file: the name.
        own: words that not every part of the model has in its name.
        others: words of other parts, which this one lacks.
    """

    file: str
    own: frozenset[str]
    others: frozenset[str]

    def holds(self, key: str) -> bool | None:
        """Whether a target is of this part, as far as its name tells."""
        components = {component.lower() for component in key.split(".")}
        if components & self.own:
            return True
        return False if components & self.others else None

    def align(self, wanted: Sequence[str], names: Collection[str]) -> Alignment:
        """Equal names; and under one prefix, the targets that the file's name says to be of this part."""
        equal = under(("", ""), wanted, names).names
        mine = [key for key in wanted if key not in equal and self.holds(key)]
        fits = {rule: under(rule, mine, names).names for rule in rules_of(mine, names)}
        best = max((len(found) for found in fits.values()), default=0)
        chosen = [rule for rule, found in fits.items() if len(found) == best]
        if len(chosen) > 1:
            return Alignment(equal, ("", "") if equal else None, rivals=tuple(sorted(told(*rule) for rule in chosen)))
        if not chosen:
            return Alignment(equal, ("", "") if equal else None)
        (rule,) = chosen
        # What the file's name does not speak of, such as a head, follows the rule of what it does speak of.
        rest = [key for key in wanted if key not in equal and self.holds(key) is None]
        return Alignment({**under(rule, rest, names).names, **fits[rule], **equal}, rule)

    def doubt(self, key: str, wanted: Sequence[str], names: Collection[str], taken: Collection[str]) -> str | None:
        """A name of the graph that may well be the target, though nothing says so; None where there is none."""
        if self.holds(key) is False:
            return None
        equal = {("", "")} if key in names else set()  # the user's map said another name
        for rule in sorted(rules_of([key], names, wanted) | equal):
            other = under(rule, [key], names).names[key]
            if other not in taken:
                return other
        return None


def parts(files: Iterable[str]) -> dict[str, Part | None]:
    """File → part; None for a file that is alone."""
    words = {file: _words(file) for file in files}
    if len(words) == 1:
        return dict.fromkeys(words)
    common = frozenset.intersection(*words.values())
    every = frozenset.union(*words.values())
    return {file: Part(file, own - common, every - own - common) for file, own in words.items()}


def _words(file: str) -> frozenset[str]:
    """Of the path, its folders too; not numbers, which are layers in a target's name, nor what any file is called."""
    found = re.split(r"[^a-z0-9]+", str(PurePath(file).with_suffix("")).lower())
    return frozenset(word for word in found if word and not word.isdigit()) - {"model", "onnx"}
