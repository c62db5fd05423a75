"""The arithmetic of an update in torch: on any device, under autograd and ``torch.compile``.

``loraformat.products`` says what is computed; a test holds the two together for every kind of part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraformat.axes import Placement
from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude, Part, Replace, Rows, roles_of
from loraformat_converters.torch_live.tensors import to_numpy, to_torch

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["Factors", "UpdateModule"]

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Factors(nn.Module):
    """The tensors of one part: parameters where they are trained, else buffers that ``state_dict`` leaves out.

    Args:
        trainable: gradients flow into every float tensor of it.
    """

    def __init__(self, part: Part, trainable: bool) -> None:
        super().__init__()
        self.part = part
        self.roles = [role for role, _ in roles_of(part)]
        for role, array in roles_of(part):
            tensor = to_torch(array)
            if tensor.is_floating_point() and tensor.dtype not in _PLAIN:
                tensor = tensor.float()  # torch computes with no 8-bit float
            if trainable and tensor.is_floating_point():
                self.register_parameter(role, nn.Parameter(tensor))
            else:
                self.register_buffer(role, tensor, persistent=False)

    def get(self, role: str) -> Tensor:
        """A tensor by its role, in float32 at least."""
        tensor: Tensor = getattr(self, role)
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def arrays(self) -> dict[str, Any]:
        """Role → what it is by now, as numpy has it."""
        return {role: to_numpy(getattr(self, role)).copy() for role in self.roles}

    def matrix(self) -> Tensor:
        """The unscaled matrix of an additive part, [*batch, out, in]."""
        part = self.part
        match part:
            case Lora():
                return self.get("lora_B") @ self._lora_A()
            case Loha():
                first, second = (
                    self._product(f"hada_w{n}_a", f"hada_w{n}_b", core if part.t1 is not None else None)
                    for n, core in ((1, "t1"), (2, "t2"))
                )
                return first * second
            case Lokr():
                return torch.kron(self._side("lokr_w1", None), self._side("lokr_w2", "t2").contiguous())
            case Delta():
                return self.get("delta").reshape(part.matrix_shape())
            case _:
                raise TypeError(f"a {part.kind} part has no matrix")

    def _lora_A(self) -> Tensor:  # noqa: N802
        a = self.get("lora_A")
        if "mid" not in self.roles:
            return a
        core = torch.einsum("mn...,ni->mi...", self.get("mid"), a)
        return core.reshape(core.shape[0], -1)

    def _side(self, name: str, core: str | None) -> Tensor:
        if name in self.roles:
            whole = self.get(name)
            return whole.reshape(whole.shape[0], -1)
        return self._product(f"{name}_a", f"{name}_b", core if core in self.roles else None)

    def _product(self, a: str, b: str, core: str | None) -> Tensor:
        if core is None:
            second = self.get(b)
            return self.get(a) @ second.reshape(second.shape[0], -1)
        whole = torch.einsum("ij...,jr,ip->pr...", self.get(core), self.get(b), self.get(a))
        return whole.reshape(whole.shape[0], -1)


class UpdateModule(nn.Module):
    """A placed update as a module: ``forward`` gives W' of W.

    Attributes:
        strength: multiplies ΔW; a magnitude stays, as in ``loraformat.strength``.
        enabled: False: W' is W.
    """

    def __init__(self, update: Update, trainable: bool) -> None:
        super().__init__()
        assert update.placement is not None
        self.place: Placement = update.placement
        self.strength = 1.0
        self.enabled = True
        self.parts = nn.ModuleList(Factors(part, trainable) for part in update.parts)

    @property
    def pair(self) -> Factors | None:
        """The factors, where the update is nothing but a pair of two axes each."""
        factors = self.parts[0]
        assert isinstance(factors, Factors)
        alone = len(self.parts) == 1 and isinstance(factors.part, Lora)
        return factors if alone and "mid" not in factors.roles and factors.get("lora_A").dim() == 2 else None

    @property
    def scale(self) -> float:
        """What multiplies the product of the pair."""
        part: Any = self.parts[0].part
        return float(part.scale) * self.strength

    def forward(self, weight: Tensor) -> Tensor:
        """W' in the dtype of W: float32 arithmetic (float64 of a float64 base), rounded once."""
        if not self.enabled:
            return weight
        value = weight if weight.dtype == torch.float64 or not weight.is_floating_point() else weight.float()
        for factors in self.parts:
            assert isinstance(factors, Factors)
            value = self._applied(factors, value)
        return value.to(weight.dtype)

    def _applied(self, factors: Factors, value: Tensor) -> Tensor:
        part = factors.part
        match part:
            case Replace():
                stored: Tensor = factors.replace  # type: ignore[assignment]
                return stored if not value.is_floating_point() else factors.get("replace")
            case Magnitude():
                return self._rescaled(part, factors.get("magnitude"), value)
            case Rows():
                indices: Tensor = factors.indices  # type: ignore[assignment]
                return value.index_copy(part.axis, indices, factors.get("values").to(value.dtype))
            case _:
                return value + self._laid(factors.matrix()) * (part.scale * self.strength)

    def _laid(self, matrix: Tensor) -> Tensor:
        """A matrix [*batch, out, in] in the axes of the parameter."""
        place = self.place
        order = (*place.batch, *place.out, *place.in_)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.expand(place.matrix_shape).reshape([place.shape[a] for a in order]).permute(inverse)

    def _rescaled(self, part: Magnitude, magnitude: Tensor, value: Tensor) -> Tensor:
        """magnitude · V / (‖V‖ + eps); the norm is a constant to the gradient (arXiv:2402.09353 §4.3)."""
        place = self.place
        kept = (*place.batch, *place.out) if part.magnitude_axes is None else part.magnitude_axes
        over = [a for a in range(value.dim()) if a not in kept]
        length = (value.detach().square().sum(over, keepdim=True).sqrt() if over else value.detach().abs()) + part.eps
        ascending = sorted(range(len(kept)), key=kept.__getitem__)
        laid = magnitude.reshape([place.shape[a] for a in kept]).permute(ascending)
        return laid.reshape([n if a in kept else 1 for a, n in enumerate(place.shape)]) * (value / length)
