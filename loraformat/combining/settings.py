"""A method and its settings: which it has, and which are possible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from loraformat.combining.methods import DENSE, DRAWS, METHODS, PEFT, PRUNES
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest

__all__ = ["How", "check_settings", "settings"]


@dataclass(frozen=True, slots=True)
class How:
    """A method and its settings.

    Attributes:
        method: see ``loraformat.combining.methods``.
        rank: of the result; ``full`` keeps a dense ``delta``; None where the method itself says.
        density: the share of entries that pruning keeps, above 0 and at most 1.
        gamma: the share of entries that ``breadcrumbs`` takes for outliers.
        epsilon: how far apart the keeping probabilities of ``della`` lie.
        seed: of what is drawn.
    """

    method: str = "cat"
    rank: int | Literal["full"] | None = None
    density: float | None = None
    gamma: float = 0.01
    epsilon: float = 0.1
    seed: int = 0

    @property
    def kept(self) -> float:
        """The density, of a method that was checked to have one."""
        assert self.density is not None
        return self.density


def check_settings(how: How, count: int) -> None:
    """LF-705 for a method that does not exist, and for settings that it does not have or that are impossible."""
    if how.method not in METHODS:
        close = nearest(how.method, METHODS, 1)
        mean = f"  Did you mean {close[0]}?" if close else ""
        raise fault("LF-705", f"unknown method {how.method!r}.{mean}", fix=f"one of {', '.join(METHODS)}")
    if faults := [Problem("LF-705", what, how.method, fix) for what, fix in _wrong(how, count)]:
        raise LoraFormatError(faults)


def _wrong(how: How, count: int) -> Iterator[tuple[str, str]]:
    """(what, how to fix it)."""
    name, density, rank = how.method, how.density, how.rank
    if not count:
        yield "no adapter is given", ""
    if name == "slerp" and count != 2:
        yield f"an arc has two ends, not {count}", "give two adapters"
    if name in PRUNES and density is None:
        yield "which share of the entries is kept?", "give --density, such as 0.5"
    if name not in PRUNES and density is not None:
        yield "this method prunes nothing: a density has no meaning", ""
    if density is not None and not 0 < density <= 1:
        yield f"a density of {density:g}", "above 0 and at most 1"
    if not 0 <= how.gamma < 1:
        yield f"a gamma of {how.gamma:g}", "at least 0 and below 1"
    if name == "della" and density and not 0 <= how.epsilon < 2 * density:
        yield f"an epsilon of {how.epsilon:g} with a density of {density:g}", "at least 0, below 2 · density"
    yield from _wrong_rank(name, rank)


def _wrong_rank(name: str, rank: int | str | None) -> Iterator[tuple[str, str]]:
    if isinstance(rank, int) and rank < 1:
        yield f"a rank of {rank}", "at least 1"
    if rank is None and (name in DENSE or name == "svd"):
        yield "the result has no low rank of its own", f"give --rank R{', or full' if name in DENSE else ''}"
    if isinstance(rank, str) and rank != "full":
        yield f"a rank of {rank!r}", "a number, or full"
    if rank == "full" and name not in DENSE:
        yield "only methods on dense ΔW have a full result", "linear keeps every digit, in factors"
    if rank is not None and (name == "cat" or (name in PEFT and not name.endswith("svd"))):
        yield "ranks follow from the adapters", "svd gives the nearest of a rank"


def settings(how: How) -> dict[str, Any]:
    """Those that the method has, as JSON."""
    used = {"method", "rank"} | ({"density"} if how.method in PRUNES else set())
    used |= {"seed"} if how.method in DRAWS else set()
    used |= {"breadcrumbs": {"gamma"}, "della": {"epsilon"}}.get(how.method, set())
    return {name: value for name, value in asdict(how).items() if name in used and value is not None}
