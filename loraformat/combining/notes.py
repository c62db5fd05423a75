"""What is said about adapters, of the one that is made of them: what all say, or what nobody contradicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraformat import canonical

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["about", "base_model", "extensions"]

_LISTS = ("trigger_words", "tags")


def base_model(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What some say and nobody contradicts."""
    return _undisputed([adapter.base_model for adapter in adapters])


def about(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What all say alike, and the trigger words and tags of each."""
    found = _alike([adapter.about for adapter in adapters])
    for name in _LISTS:
        words = [word for adapter in adapters for word in _words(adapter.about.get(name))]
        if words:
            found[name] = list(dict.fromkeys(words))
    return found


def extensions(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Of a layout that all came from, what their configurations say alike: its writer takes of it what still holds."""
    found = {}
    for name in adapters[0].extensions:
        texts = [adapter.extensions.get(name) for adapter in adapters]
        values = [_value(text) for text in texts]
        if len(set(texts)) == 1:
            found[name] = adapters[0].extensions[name]
        elif all(isinstance(value, dict) for value in values):
            found[name] = json.dumps(_alike(values), indent=2, ensure_ascii=False)
    return found


def _undisputed(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for value in values for name in value):
        said = [value[name] for value in values if name in value]
        if all(isinstance(member, Mapping) for member in said):
            found[name] = _undisputed(said)
        elif all(member == said[0] for member in said):
            found[name] = said[0]
    return found


def _alike(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in values[0]:
        said = [value.get(name) for value in values]
        if all(isinstance(member, Mapping) for member in said):
            found[name] = _alike([member for member in said if isinstance(member, Mapping)])
        elif all(name in value for value in values) and all(member == said[0] for member in said):
            found[name] = said[0]
    return found


def _words(value: Any) -> list[str]:
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


def _value(text: str | None) -> Any:
    try:
        return canonical.loads(text or "null")
    except (ValueError, RecursionError):
        return None
