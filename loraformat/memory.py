"""A source that lies in memory: tensors and texts that a program holds already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.container import Container
from loraformat.dtypes import dtype_name
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.source import Source

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["MemorySource"]


class MemorySource(Source):
    """What a layout reads, without any file.

    Args:
        tensors: name → array, or what ``numpy.asarray`` makes one of.
        header: the container's own metadata strings.
        sidecars: file name → text of what would lie beside the tensors.

    Raises:
        LoraFormatError: LF-314 a value is no array of a dtype that files hold.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        header: Mapping[str, str] | None = None,
        sidecars: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(Path(os.devnull))
        self.path, self.file = Path("(tensors)"), None
        self.folder = Path(os.devnull)  # nothing lies beside it
        self._arrays = _arrays(tensors)
        self._header, self._sidecars = dict(header or {}), dict(sidecars or {})

    @property
    def container(self) -> Container:
        """There is none: LF-501."""
        raise fault("LF-501", "the tensors lie in no file")

    @property
    def tensors(self) -> Mapping[str, Array]:
        """Tensor name → array."""
        return self._arrays

    @property
    def header(self) -> Mapping[str, str]:
        """As given."""
        return self._header

    def sidecar(self, name: str) -> str | None:
        """As given."""
        return self._sidecars.get(name)


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    import numpy as np

    arrays, problems = {}, []
    for name, value in tensors.items():
        try:
            arrays[name] = np.asarray(value)
            dtype_name(arrays[name].dtype)
        except (TypeError, ValueError) as error:
            what = f"a {type(value).__name__} is no array of a known dtype: {error}"
            problems.append(Problem("LF-314", what, name, "numpy arrays, or what numpy.asarray takes"))
    if problems:
        raise LoraFormatError(problems)
    return arrays
