"""A report: one self-contained page about an adapter, or about what is attached to a model.

``facts`` is what it tells, ``page`` how; ``heat`` and ``spectra`` are its pictures, ``html`` makes sure that a name
in a file stays a name, ``style`` how all of it looks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from loraformat.pages.facts import Facts, facts
from loraformat.pages.page import fragment, page

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.resolve import Hints

__all__ = ["Facts", "facts", "fragment", "html_of", "page", "report"]


def report(adapter: Adapter, *, name: str = "adapter", base: Base | None = None, hints: Hints | None = None) -> str:
    """The page about an adapter.

    Args:
        base: look every target up in it, and show ‖ΔW‖ / ‖W‖.

    Raises:
        LoraFormatError: LF-312 a value that is not finite.
    """
    return page([facts(adapter, os.path.basename(name), base=base, hints=hints)], name)


def html_of(adapter: Adapter) -> str:
    """What a notebook shows of an adapter."""
    return fragment(facts(adapter, "Adapter"))
