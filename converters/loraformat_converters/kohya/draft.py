"""An adapter in the making: parts by parameter, and everything that is wrong or worth saying, gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.dtypes import dtype_name
from loraformat.gathered import Gathered
from loraformat.shapes import FLOATS

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.layout import ReadOptions

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["Draft", "torch_placement"]


def torch_placement(shape: tuple[int, ...]) -> Placement:
    """Of a tensor as torch's Linear and convolutions have it, [out, in, *kernel]; of a vector, [out]."""
    return Placement(tuple(shape), (0,), tuple(range(1, len(shape))))


class Draft(Gathered):
    """What the readers of kohya's kinds share.

    Attributes:
        options: what the user states.
        without_alpha: the modules whose scale the file does not state.
    """

    def __init__(self, options: ReadOptions) -> None:
        super().__init__()
        self.options = options
        self.without_alpha: list[str] = []

    def sound(self, module: str, roles: Roles) -> bool:
        """Whether the tensors are floats and not empty; an alpha is looked at where it is used."""
        good = True
        for role, tensor in roles.items():
            if role == "alpha":
                continue
            dtype, sizes = dtype_name(tensor.dtype), list(tensor.shape)
            if dtype not in FLOATS:
                self.say("LF-314", f"{role} is {dtype}; factors are floats", module)
            elif 0 in sizes or not sizes:
                self.say("LF-311", f"{role} holds no values: {sizes}", module)
            else:
                continue
            good = False
        return good
