"""The adapter of which several files hold shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.errors import fault
from loraformat.names import join
from loraformat_converters.onnx.base import OnnxBase

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["whole"]


def whole(held: Iterable[tuple[str | None, OnnxBase]]) -> list[tuple[str, Adapter]]:
    """(name, adapter) of what is attached to the models of these components.

    Raises:
        LoraFormatError: LF-613 a record cannot be read, or a part of an adapter is gone.
    """
    found: dict[str, Adapter] = {}
    for component, base in held:
        assert base.record is not None
        for entry, (name, own) in zip(base.record.attached, base.extract(), strict=True):
            components = tuple(map(str, entry.get("components", ())))
            first = found.setdefault(name, replace(own, targets={}, components=components))
            if first.components != components:
                raise fault("LF-613", "two files hold parts of two adapters of one name", where=name)
            prefix = component if components else None
            targets = {join(prefix, key): update for key, update in own.items()}
            found[name] = replace(first, targets={**targets, **first.targets})
    return list(found.items())
