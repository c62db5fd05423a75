"""What was loaded, in memory of its own.

The tensors of an adapter are views of its mapped file. A file that is written over, as safetensors 0.8 and torch.save do
it where one of that name is, changes under them: another adapter's numbers under this one's name; one that is cut ends
the process (SIGBUS). A service keeps adapters for longer than it knows their files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.parts import Part, roles_of

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["kept"]


def kept(adapter: Adapter) -> Adapter:
    """The adapter with copies of its tensors."""
    targets = {}
    for key, update in adapter.items():
        sketch = None if update.sketch is None else np.array(update.sketch)
        targets[key] = replace(update, parts=tuple(map(_copied, update.parts)), sketch=sketch)
    return replace(adapter, targets=targets)


def _copied(part: Part) -> Part:
    own: dict[str, Any] = {role: np.array(tensor) for role, tensor in roles_of(part)}
    return replace(part, **own)
