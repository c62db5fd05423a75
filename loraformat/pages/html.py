"""HTML that cannot be broken out of: elements are made of text, which is always escaped, and of other elements."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["Content", "Markup", "element", "joined", "said"]

_VOID = frozenset({"meta", "br", "wbr", "hr"})
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")


class Markup(str):
    """HTML that ``element`` made; every other string is text."""

    __slots__ = ()


Content = str | Markup | Iterable["Content"] | None


def element(tag: str, *content: Content, **attributes: str | int | float | None) -> Markup:
    """``<tag …>content</tag>``.

    Args:
        content: text, elements, lists of them; None for nothing.
        attributes: None leaves one out; ``class_`` is ``class``, and ``_`` in a name ``-``.

    >>> element("td", "a < b", class_="x", aria_label='say "it"')
    '<td class="x" aria-label="say &quot;it&quot;">a &lt; b</td>'
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    assert all(_NAME.fullmatch(name) for name in (tag, *names.values()))
    words = [f' {names[name]}="{_escaped(str(value))}"' for name, value in attributes.items() if value is not None]
    opened = f"<{tag}{''.join(words)}>"
    return Markup(opened if tag in _VOID else f"{opened}{joined(content)}</{tag}>")


def joined(content: Content) -> Markup:
    """One piece after the other."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(_escaped(content))
    return Markup("".join(map(joined, content)))


def said(text: object) -> Markup:
    """A stranger's words: isolated, so that they cannot turn the writing around them; breakable after dots."""
    pieces = re.split(r"(?<=[./_:])", str(text))
    return element("bdi", [[element("wbr"), piece] if i else piece for i, piece in enumerate(pieces)])


def _escaped(text: str) -> str:
    """Control characters, which HTML forbids or obeys, are shown by what Python calls them."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return html.escape(shown)
