"""What a base is: something that holds weights, into which an adapter's targets are resolved and written.

A third party adds a kind of base with an entry point in the group ``loraformat.bases``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.axes import Placement
    from loraformat.plan import Job, Outcome, Plan, Proof
    from loraformat.resolve import Hints, Match, Resolution
    from loraformat.tiles import Norms, Tensor
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = [
    "Base",
    "BaseKind",
    "FewBits",
    "Graph",
    "Options",
    "Parameter",
    "Recognising",
    "Requantising",
    "Runnable",
    "Stored",
    "Tying",
]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight of a base under its logical name: shape and dtype (safetensors spelling)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Options:
    """How a verb is carried out.

    Attributes:
        out: the output file.
        mode: of ``attach``: ``branch``, ``swap`` or ``stack``.
        prefold: store what a runtime that optimises would compute once, in the place of the adapter's own tensors.
        requantize: round to few bits again where a weight is stored so.
        survival: the least share of ΔW that must survive the dtype of storage.
        slots: of swap: ``optional`` inputs have a default, ``required`` ones are fed always.
        pad_rank: of swap: the rank of all slots, which smaller adapters are filled up to; None: any rank is fed.
        slot_names: of swap: ``native``, ``olive`` or ``genai``.
        targets: of swap: patterns of weights that get slots whether an adapter has them or not.
        rows: of stack: the inputs whose axis counts the rows, as ``INPUT`` or ``INPUT:AXIS``.
        select: of stack: by ``index`` or by ``weights``.
        provider: of branch and stack: ``cpu`` or ``cuda``, for which the graph is laid out.
        topology: of branch: where pairs act: ``separate`` beside the operator, ``concat`` in its product, ``folded`` in
            its weight; ``auto``: as is fast on the provider.
        live_scale: of branch: the strength of each adapter is an input, 1 where nothing is fed.
    """

    out: Path
    mode: str = "branch"
    prefold: bool = False
    requantize: bool = False
    survival: float = 0.1
    slots: str = "optional"
    pad_rank: int | None = None
    slot_names: str = "native"
    targets: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    select: str = "index"
    provider: str = "cpu"
    topology: str = "auto"
    live_scale: bool = False


class BaseKind(Protocol):
    """How one kind of base is recognised and opened."""

    name: str
    describes: str
    """What a person calls it, for the error that lists the kinds."""

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` is of this kind, by its name and first bytes."""

    def open(self, path: Path) -> Base:
        """Open it; nothing large is read."""


class Base(Protocol):
    """An opened base. Reading never loads more than one tensor at a time."""

    path: Path
    verbs: frozenset[str]
    """Which verbs it takes: ``merge``, ``attach``, and those of ``Graph``."""

    def parameters(self) -> Mapping[str, Parameter]:
        """Logical name → weight, for every weight that an adapter could target; ``FILE:NAME`` in a base of several files."""

    def describe(self) -> Mapping[str, Any]:
        """What it is, as JSON has it, for ``info``: ``kind`` and whatever that kind can tell; reads no weight."""

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Every weight of two axes that a new adapter could target, by logical name; None where unplaced."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values of a weight, a view of the file where it can be; or of the rows [start, stop) of its axis 0."""

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """Where every target of ``adapter`` lies, with the evidence. Never guesses; writes nothing."""

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What ``verb`` would read and write, the jobs applied one after the other; every refusal happens here."""

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Carry the plan out, atomically."""


@runtime_checkable
class Runnable(Protocol):
    """A base that some runtime executes."""

    def how(self, language: str) -> str:
        """Code that runs it, for its own inputs and outputs: python, cpp, csharp, js or genai; LF-705 where none is."""


@runtime_checkable
class Stored(Protocol):
    """A base that lies in other files than the one that its path names."""

    def stored(self) -> Iterable[Path]:
        """Where its weights lie."""


@runtime_checkable
class Tying(Protocol):
    """A base whose modules may share a tensor."""

    def ties(self) -> Mapping[str, str]:
        """Name → the name of the tensor that is loaded for it, whether or not it is stored too."""


@runtime_checkable
class Recognising(Protocol):
    """A base whose weights need not be plain tensors of it, and that can say which they are: a graph with quantised ones."""

    def sketch(self, match: Match) -> npt.NDArray[np.float32] | None:
        """The sketch of what is computed with at a place; None where it has none."""


@runtime_checkable
class Requantising(Protocol):
    """A base that may hold weights in few bits, and merges into them."""

    def requantised(
        self, name: str, updates: Sequence[Update], norms: Norms | None = None
    ) -> Iterator[tuple[tuple[int, int], Array]] | None:
        """(rows of the tensor, what a merge stores in them) of such a weight, in order; None of any other.

        Args:
            norms: filled on the way.
        """


@runtime_checkable
class FewBits(Requantising, Protocol):
    """A base that holds them as numbers beside their scales, which it can read."""

    def dequantised(self, name: str) -> Tensor | None:
        """The values of such a weight, float32, in the axes in which it is stored; None of any other."""


class Graph(Base, Protocol):
    """A base that runs by itself, and that can give back what ``attach`` put into it."""

    @property
    def attached(self) -> Sequence[str]:
        """The names of the adapters that are attached."""

    @property
    def identity(self) -> str:
        """SHA-256 of the graph with the weights that it holds itself: not of data files beside it."""

    def detach(self, out: Path, *, force: bool = False) -> Outcome:
        """Write the base as it was before ``attach``, bit for bit; LF-613 where it was changed since."""

    def extract(self) -> Sequence[tuple[str, Adapter]]:
        """(name, adapter) of everything that is attached, bit for bit."""

    def without(self) -> Graph:
        """The base as it was before ``attach``, in memory."""

    def inlined(self) -> Graph:
        """The base with its functions written out, where their weights can be changed."""

    def check_provable(self, plan: Plan, inputs: Path | None = None) -> None:
        """Refuse now what ``prove`` could not do once the plan is carried out."""

    def prove(self, plan: Plan, inputs: Path | None = None) -> Proof:
        """Run what ``apply`` wrote against base and adapter put together in another way.

        Args:
            inputs: a file with values for the graph's inputs; else they are made up.
        """
