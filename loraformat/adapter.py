"""An adapter: base parameter → update, and what is said about the whole."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loraformat.names import split
from loraformat.updates import Update

__all__ = ["Adapter"]


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, Update]):
    """A mapping from key to update. Immutable; ``dataclasses.replace`` gives changed copies.

    Attributes:
        targets: base parameter (in the name space ``names``) → update.
        names: the name space of the keys: torch, mlx, gguf, flax, keras, kohya or a reverse-DNS name.
        components: of a model of several components, their names; each key then begins with ``<component>:``.
        base_model: ``{name, revision, …}``, or component → such a mapping.
        about: ``{title, license, trigger_words, tags, training}``.
        provenance: what wrote the file, and from what; no time, host or path.
        extensions: layout → the source's own configuration text, to be given back unchanged.
        requires: features that a reader must understand or refuse the file.

    >>> from loraformat.testing import random_adapter
    >>> adapter = random_adapter(seed=1)
    >>> sorted(adapter)[0], adapter[sorted(adapter)[0]].rank
    ('blocks.0.attn.weight', 3)
    """

    targets: Mapping[str, Update]
    names: str = "torch"
    components: tuple[str, ...] = ()
    base_model: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extensions: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Update:
        return self.targets[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def of_component(self, component: str | None) -> Adapter:
        """One component's targets, by their own names; of an adapter without components, None gives all."""
        own = {name: u for key, u in self.items() for c, name in [split(key, self.components)] if c == component}
        return replace(self, targets=own, components=())

    def _repr_html_(self) -> str:
        """What a notebook shows: the facts and a heat map."""
        page: str = importlib.import_module("loraformat.pages").html_of(self)  # by name: it is made of adapters itself
        return page
