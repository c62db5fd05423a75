"""Name spaces: what else a model's parameters are called, and how they lie there. The contract of ``retarget``.

``torch`` is the space in the middle: every other space says how it stands to torch, so that N spaces need N plug-ins.
A third party adds one with an entry point in the group ``loraformat.spaces``, whose object has the attributes of
``Space``. A layout that reads keys in a space of its own (``Adapter.names``) brings the space along.

A space for a tool that calls everything ``net.<torch name>`` and keeps kernels as [in, out]:

    class Net:
        name = "org.example.net"
        describes = "the names of Net"

        def links(self, known):
            for key in known.torch_keys(lambda own: own.removeprefix("net.")):
                yield Link(Seat(key, axes="out,in"), Seat(f"net.{key}", axes="in,out"), "rule: net.")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.naming.links import Link

__all__ = ["TORCH", "Known", "Space", "space_of"]

TORCH = "torch"


@dataclass(frozen=True, slots=True)
class Known:
    """What a space has to go by.

    Attributes:
        adapter: whose keys are to be translated; ``adapter.names`` is ``torch`` or the space's own name, which tells the
            direction. Its updates tell sizes.
        names: torch key (``unet:conv_in.weight`` in a model of components) → shape, None where that is not known: of
            the base that the user gave, whole; empty where he gave none.
        config: the ``config.json`` of the model, where one is known; else empty.
        there: key of the space → shape, None where that is not known: of a base whose names are the space's own.
    """

    adapter: Adapter
    names: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    there: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)

    def torch_keys(self, from_own: Callable[[str], str | None]) -> Iterable[str]:
        """The torch keys that may matter: the base's, else the adapter's own, translated where they are the space's.

        Args:
            from_own: a key of the space → the torch key; None where there is none, which the verb then reports.
        """
        if self.names:
            return self.names
        if self.adapter.names == TORCH:
            return self.adapter
        return [key for own in self.adapter if (key := from_own(own)) is not None]


class Space(Protocol):
    """How one name space stands to torch. Stateless; data is loaded when it is asked for."""

    name: str
    """The word in ``Adapter.names``, and for ``--to``; or ``torch`` for other torch names of the same model (another
    version of a library, the layout of a checkpoint as it was first published)."""

    describes: str
    """What a person calls it."""

    def links(self, known: Known) -> Iterable[Link]:
        """How torch parameters (``here``) stand to the space's own (``there``): always in this direction.

        At least those of the adapter's keys, if they are known; more do no harm. It never guesses: where two readings
        are possible it gives the links of both, and the verb refuses what they leave ambiguous (LF-603). Where it
        knows no reading it gives no link, and the verb refuses what is left over (LF-602). What a rule needs and does
        not have (a number of heads) it refuses itself, with LF-604 and the way to state it.
        """


def space_of(base: Base) -> str:
    """The name space of a base's parameters: its ``names``, where it has such; a checkpoint's and a graph's are torch."""
    space: str = getattr(base, "names", TORCH)
    return space
