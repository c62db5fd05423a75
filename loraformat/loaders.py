"""Who loads an adapter as it is, and computes what it says: the contract of a loader's rules, and the verdict.

A loader is a program that runs adapters: a server, a user interface, a runtime. What each accepts, ignores and gets
wrong is known by its source; a third party adds one with an entry point in the group ``loraformat.loaders``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Loader", "Reason", "Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that stands between a file and a loader.

    Attributes:
        verdict: ``no``: it refuses the file, or ignores a part of it; ``wrong``: it loads it and computes other numbers;
            ``if``: it depends on a setting.
        what: what is at fault, in terms of the file.
        where: the first target that it concerns.
        fix: a way out.
        source: where the loader's own code says so, with its version.
    """

    verdict: Literal["no", "wrong", "if"]
    what: str
    where: str = ""
    fix: str = ""
    source: str = ""


class Loader(Protocol):
    """A program that runs adapters, and its rules."""

    name: str
    version: str
    """Of the source that the rules were read in."""

    describes: str

    layouts: Sequence[str]
    """The layouts that it loads; the first is what to convert to."""

    def reasons(self, adapter: Adapter) -> Iterable[Reason]:
        """Whatever keeps it from computing what ``adapter`` says, were the file in a layout that it loads."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one loader loads one file."""

    loader: Loader
    reasons: Sequence[Reason]

    @property
    def answer(self) -> Literal["yes", "if", "no"]:
        """``no`` where it refuses or computes something else, ``if`` where it needs a setting."""
        if any(reason.verdict != "if" for reason in self.reasons):
            return "no"
        return "if" if self.reasons else "yes"


def judge(adapter: Adapter, layout: str, loader: Loader) -> Verdict:
    """Whether ``loader`` runs an adapter that lies in ``layout``."""
    reasons = list(loader.reasons(adapter))
    if layout not in loader.layouts:
        fix = f"loraformat convert FILE OUT --to {loader.layouts[0]}"
        what = f"the file is {layout}; {loader.name} loads {', '.join(loader.layouts)}"
        reasons.insert(0, Reason("no", what, fix=fix))
    return Verdict(loader, reasons)
