"""W + ΔW in the place of W, by the arithmetic of ``loraformat.merge``: bit for bit what it writes into a checkpoint.

The parameter object is kept aside and a new one put in its place: so a tie ends where the merge needs it to, and going
back is exact, for nothing is ever subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from loraformat.shapes import FLOATS
from loraformat.tiles import Norms, changed
from loraformat_converters.torch_live.tensors import dtype_word, to_numpy, to_torch

if TYPE_CHECKING:
    from loraformat.updates import Update
    from loraformat_converters.torch_live.base import Place

    Acting = Callable[[], Update | None]

__all__ = ["put", "refresh", "refusal", "take", "touched"]

_KEY = "_loraformat_merged"


class _Merged:
    """One parameter whose place is taken.

    Attributes:
        original: the tensor that was there.
        acting: what acts on it now, in order; each gives None while it is switched off.
    """

    def __init__(self, at: Place) -> None:
        self.at = at
        self.original = at.stored
        self.acting: list[Acting] = []
        self.version: tuple[int, int] | None = None

    def value(self) -> Tensor:
        """W', of the original and all that acts."""
        updates = [update for one in self.acting if (update := one()) is not None]
        tiles = list(changed(updates, to_numpy(self.original), Norms()))
        whole = np.concatenate(tiles) if self.original.dim() else tiles[0]
        return to_torch(whole.reshape(self.original.shape)).to(self.at.stored.device, self.at.stored.dtype)

    def refresh(self) -> None:
        """Put W' there, as it is now."""
        value = self.value()
        if self.version is None:
            made = nn.Parameter(value, self.original.requires_grad) if _is_parameter(self.original) else value
            _set(self.at, made)
        else:
            with torch.no_grad():
                self.at.stored.copy_(value)
        self.version = (id(self.at.stored), self.at.stored._version)

    def restore(self) -> None:
        """Put the original back; where the module was moved or cast meanwhile, it goes there too."""
        now = self.at.stored
        if (self.original.device, self.original.dtype) != (now.device, now.dtype):
            self.original.data = self.original.data.to(now.device, now.dtype)
        _set(self.at, self.original)


def put(at: Place, acting: Acting) -> None:
    """Merge one more update."""
    places: dict[str, _Merged] = at.module.__dict__.get(_KEY, {})
    merged = places.get(at.leaf) or _Merged(at)
    merged.acting.append(acting)
    try:
        merged.refresh()
    except BaseException:
        merged.acting.pop()
        raise
    places[at.leaf] = merged
    at.module.__dict__[_KEY] = places


def refresh(at: Place) -> None:
    """Compute a merged parameter again, after a weight or a switch was changed."""
    at.module.__dict__[_KEY][at.leaf].refresh()


def take(at: Place, acting: Acting) -> None:
    """Without this update; after the last one the very tensor that was there is back."""
    places = at.module.__dict__[_KEY]
    merged: _Merged = places[at.leaf]
    merged.acting.remove(acting)
    if merged.acting:
        merged.refresh()
        return
    merged.restore()
    del places[at.leaf]
    if not places:
        del at.module.__dict__[_KEY]


def touched(at: Place) -> bool:
    """Whether somebody wrote into the merged parameter, or put another in its place: what it holds would be lost."""
    merged: _Merged | None = at.module.__dict__.get(_KEY, {}).get(at.leaf)
    if merged is None or merged.version == (id(at.stored), at.stored._version):
        return False
    return not torch.equal(merged.value(), at.stored.detach())  # a parametrization writes too, and changes nothing


def refusal(at: Place, update: Update) -> str | None:
    """Why nothing can be merged into this parameter, or None."""
    tensor = at.stored
    if tensor.is_meta:
        return "the tensor has no values (it is on the meta device)"
    if dtype_word(tensor.dtype) not in FLOATS and not update.replaces:
        return f"a tensor of {dtype_word(tensor.dtype)} is no weight that float arithmetic changes"
    if type(tensor) not in (nn.Parameter, Tensor):
        return f"a {type(tensor).__name__} holds its values in a form of its own"
    if at.parametrizations is not None and not at.parametrizations.is_tensor:
        return "it is computed from several tensors by a parametrization"
    return None


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _set(at: Place, tensor: Tensor) -> None:
    """Make ``tensor`` what ``at.stored`` gives."""
    if at.parametrizations is None:
        setattr(at.module, at.leaf, tensor)
    else:
        at.parametrizations.original = tensor
