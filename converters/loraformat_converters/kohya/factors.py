"""The additive parts of one module, out of the tensors that its roles name.

Where some tensor has the axes of the weight itself (a convolution's ``lora_down``, a core, a ``diff``), the file says
how the matrix lies, and the part is placed; a pair of two axes, or a kernel flattened into a factor, says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from loraformat.parts import Additive, Delta, Loha, Lokr, Lora
from loraformat_converters.kohya import scales
from loraformat_converters.kohya.draft import torch_placement
from loraformat_converters.kohya.scales import Scale

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat_converters.kohya.draft import Draft

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["METHODS", "Factors", "Method", "vector"]


class Factors(NamedTuple):
    """A part, its placement where the tensors show it, and what was assumed."""

    part: Additive
    place: Placement | None = None
    assumed: tuple[str, ...] = ()


def lora(module: str, roles: Roles, draft: Draft) -> Factors | None:
    """A pair [r, in] and [out, r]; of a convolution [r, in, *kernel] and [out, r, 1, …]; around a core perhaps."""
    down, up, mid = roles["down"], roles["up"], roles.get("mid")
    kernel = down.shape[2:] if mid is None else mid.shape[2:]
    ones = [up.shape[2:], *([] if mid is None else [down.shape[2:]])]
    if down.ndim < 2 or up.ndim != down.ndim or any(n != 1 for tail in ones for n in tail):
        what = f"lora_down {list(down.shape)} and lora_up {list(up.shape)}"
        draft.say("LF-309", f"{what} must be [r, in] and [out, r], or [r, in, *kernel] and [out, r, 1, …]", module)
        return None
    scale = scales.read(module, roles, down.shape[0], draft)
    if scale is None:
        return None
    a = down.reshape(down.shape[0], -1)
    part = Lora(a, up.reshape(up.shape[:2]), scale.alpha, scale.rule, mid)
    place = torch_placement((up.shape[0], down.shape[1], *kernel)) if kernel else None
    return _fitting(module, part, place, scale, draft)


def loha(module: str, roles: Roles, draft: Draft) -> Factors | None:
    """(w1_a · w1_b) ⊙ (w2_a · w2_b), each product around its core if there is one."""
    scale = scales.read(module, roles, roles["hada_w1_b"].shape[0], draft)
    if scale is None:
        return None
    factors = {role: tensor for role, tensor in roles.items() if role.startswith("hada_w")}
    part = Loha(**factors, alpha=scale.alpha, scale_rule=scale.rule, t1=roles.get("hada_t1"), t2=roles.get("hada_t2"))
    return _fitting(module, part, None, scale, draft, part.t1)


def lokr(module: str, roles: Roles, draft: Draft) -> Factors | None:
    """kron(w1, w2). The rank is that of the products; of two whole factors the scale is 1, whatever alpha says.

    lycoris-lora 4.1.3 modules/lokr.py ("use scale = 1"), and so ComfyUI weight_adapter/lokr.py (``dim`` stays None).
    """
    ranks = {roles[role].shape[0] for role in ("lokr_w1_b", "lokr_w2_b") if role in roles}
    if len(ranks) > 1:
        what = f"the products have ranks {' and '.join(map(str, sorted(ranks)))}: LyCORIS divides alpha by the first's"
        draft.say("LF-507", f"{what}, ComfyUI by the second's", module)
        return None
    r = ranks.pop() if ranks else None
    scale = Scale(1.0, "factor") if r is None else scales.read(module, roles, r, draft)
    if r is None and "alpha" in roles and scales.value_of(module, roles, draft) is None:
        return None
    if scale is None:
        return None
    factors = {role: tensor for role, tensor in roles.items() if role.startswith("lokr_w")}
    part = Lokr(scale.alpha, scale.rule, **factors, t2=roles.get("lokr_t2"), r=r)
    return _fitting(module, part, None, scale, draft, part.t2 if part.t2 is not None else part.lokr_w2)


def full(module: str, roles: Roles, draft: Draft) -> Factors | None:
    """A whole difference, in the weight's own shape; no reader gives an alpha beside it a say."""
    if "alpha" in roles and scales.value_of(module, roles, draft) is not None:
        draft.warn("LF-506", "an alpha beside a whole difference: no reader looks at it", module)
    return whole(roles["diff"])


def norm(module: str, roles: Roles, draft: Draft) -> Factors | None:
    """The difference of a normalisation layer's weight."""
    return vector(module, roles, "w_norm", draft)


def vector(module: str, roles: Roles, role: str, draft: Draft) -> Factors | None:
    """The difference of a bias, or of the weight of a norm."""
    if (tensor := roles[role]).ndim == 1:
        return whole(tensor)
    draft.say("LF-309", f"{role} is {list(tensor.shape)}; it is a vector", module)
    return None


def whole(tensor: Array) -> Factors:
    """A difference as it is: [out, in, *kernel], or a vector."""
    place = torch_placement(tensor.shape)
    return Factors(Delta(tensor if tensor.ndim < 3 else tensor.reshape(tensor.shape[0], -1)), place)


class Method(NamedTuple):
    """A kind of change to a weight: the roles that it must have, those that it may, and what reads it."""

    needs: frozenset[str]
    may: frozenset[str]
    read: Callable[[str, Roles, Draft], Factors | None]


def _roles(*names: str) -> frozenset[str]:
    return frozenset(names)


_SHARED = _roles("alpha", "dora_scale")
METHODS: Mapping[str, Method] = {
    "LoCon": Method(_roles("down", "up"), _SHARED | {"mid"}, lora),
    "LoHa": Method(_roles("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _SHARED | {"hada_t1", "hada_t2"}, loha),
    "LoKr": Method(
        frozenset(),
        _SHARED | _roles("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        lokr,
    ),
    "full": Method(_roles("diff"), _roles("alpha"), full),
    "norm": Method(_roles("w_norm"), frozenset(), norm),
}
"""By LyCORIS' names. A LoKr has many forms; ``Lokr.fault`` tells one that is none."""


def _fitting(
    module: str, part: Additive, place: Placement | None, scale: Scale, draft: Draft, core: Array | None = None
) -> Factors | None:
    """The part, placed by the kernel of ``core``; None, and LF-309, where its tensors do not fit each other."""
    if why := part.fault():
        draft.say("LF-309", why, module)
        return None
    if core is not None and core.ndim > 2:
        out, in_ = part.matrix_shape()
        place = torch_placement((out, in_ // math.prod(core.shape[2:]), *core.shape[2:]))
    return Factors(part, place, scale.assumed)
