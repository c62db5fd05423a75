"""Names with numbers in them, as pairs of templates that lead both ways."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

__all__ = ["Templates", "numbered"]


class Templates:
    """Pairs (torch name, own name), each with as many ``{}`` as the other has, for numbers.

    >>> pairs = Templates([("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp.w3.weight")])
    >>> list(pairs.there("model.layers.11.mlp.up_proj.weight")), list(pairs.here("layers.1.w3.weight"))
    (['layers.11.mlp.w3.weight'], [])
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._there = [(numbered(torch), own) for torch, own in pairs]
        self._here = [(numbered(own), torch) for torch, own in pairs]

    def there(self, key: str) -> Iterator[str]:
        """The own names of a torch name."""
        return _filled(self._there, key)

    def here(self, key: str) -> Iterator[str]:
        """The torch names of an own name."""
        return _filled(self._here, key)


@functools.cache
def numbered(template: str) -> re.Pattern[str]:
    """The names that a template means: each ``{}`` or ``{word}`` in it is a number, and a group.

    >>> numbered("model.layers.{n}.").match("model.layers.11.mlp.up_proj.weight").groups()
    ('11',)
    """
    return re.compile(r"(\d{1,9})".join(map(re.escape, re.split(r"\{\w*\}", template))))


def _filled(pairs: Sequence[tuple[re.Pattern[str], str]], key: str) -> Iterator[str]:
    return (target.format(*match.groups()) for pattern, target in pairs if (match := pattern.fullmatch(key)))
