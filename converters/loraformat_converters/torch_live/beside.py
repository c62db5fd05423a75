"""h = Wx + s·B(Ax) beside a module that multiplies by its weight, without ever forming ΔW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from loraformat_converters.torch_live.base import Place, is_conv1d

if TYPE_CHECKING:
    from loraformat_converters.torch_live.factors import UpdateModule

__all__ = ["Branch", "add", "branch_of", "uncalled"]

Branch = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(module, x, A, B) → B(Ax)."""

_CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def uncalled(roots: Iterable[nn.Module]) -> frozenset[int]:
    """The modules, by ``id``, whose weights their parents read without calling them.

    torch 2.13 functional.multi_head_attention_forward takes the weight of the output projection.
    """
    modules = (module for root in roots for module in root.modules())
    return frozenset(id(module.out_proj) for module in modules if isinstance(module, nn.MultiheadAttention))


def branch_of(at: Place, uncalled: frozenset[int]) -> Branch | None:
    """How a pair runs beside this module; None where its weight is, or may be, read in another way than by a call.

    A class that overrides ``forward`` may do anything with its weight.
    """
    module = at.module
    if at.leaf != "weight" or id(module) in uncalled:
        return None
    forward = type(module).forward
    if forward is nn.Linear.forward or is_conv1d(module):
        return _linear
    # max_norm renormalises in place the rows that are looked up: of W alone, where W + ΔW is meant
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward and module.max_norm is None:
        return _embedding
    if any(forward is kind.forward for kind in _CONVOLUTIONS):
        return _convolution
    return None


def add(branch: Branch, update: UpdateModule, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """The module's output and the branch's, in the wider of their dtypes, and then in the output's own."""
    factors = update.pair
    if factors is None or not update.enabled:
        return output
    a, b = (getattr(factors, role) for role in ("lora_A", "lora_B"))
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), output.dtype)
    lifted = x.to(wide) if x.is_floating_point() else x
    beside = branch(module, lifted, a.to(wide), b.to(wide)) * update.scale
    return (output.to(wide) + beside).to(output.dtype)


def _linear(module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, a), b)


def _embedding(module: nn.Module, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.linear(functional.embedding(ids, a.T), b)


def _convolution(module: _ConvNd, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A as a kernel of r channels for each group, then B as one of size 1 within the group."""
    kernel = a.reshape(a.shape[0], -1, *module.kernel_size)
    groups = module.groups
    inner: Tensor = module._conv_forward(x, kernel.repeat(groups, *[1] * (kernel.dim() - 1)), None)
    outer = b.reshape(*b.shape, *[1] * len(module.kernel_size))
    convolve = next(f for kind, f in _CONVOLUTIONS.items() if isinstance(module, kind))
    return convolve(inner, outer, groups=groups)
