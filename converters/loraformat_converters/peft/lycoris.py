"""LoHa and LoKr, as PEFT has them from LyCORIS: products of Hadamard and of Kronecker, alpha/r always.

A convolution's kernel is part of a core (``t1``, ``t2``) or of a whole ``lokr_w2``, or lies flattened in the rows of
``_b``. Where all of it is there the update is placed; a flattened kernel says nothing of its axes. PEFT keeps the core
of a Conv1d as [r, r, k, 1], so that a last size of 1 says nothing either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.parts import Loha, Lokr

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.peft.draft import Draft
    from loraformat_converters.peft.names import Name

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["LOHA_ROLES", "LOKR_ROLES", "read_loha", "read_lokr"]

LOHA_ROLES = frozenset(f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
LOKR_ROLES = frozenset(f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))


def read_loha(found: Mapping[Name, Roles], draft: Draft) -> None:
    """ΔW = (w1_a · w1_b) ⊙ (w2_a · w2_b) · alpha / r, each product around its core if there is one."""
    for module, roles in _sound(found, draft):
        if missing := sorted({r for r in LOHA_ROLES if "_w" in r} - roles.keys()):
            draft.say("LF-303", f"{', '.join(missing)} is missing", module, "the file is incomplete")
            continue
        scale = draft.scale(module, roles["hada_w1_b"].shape[0])
        if scale is None:
            continue
        factors = {role: roles[role] for role in LOHA_ROLES if "_w" in role}
        loha = Loha(**factors, alpha=scale[0], scale_rule=scale[1], t1=roles.get("hada_t1"), t2=roles.get("hada_t2"))
        kernel = loha.t1.shape[2:] if loha.t1 is not None else ()
        _add(module, loha, kernel, draft)


def read_lokr(found: Mapping[Name, Roles], draft: Draft) -> None:
    """ΔW = kron(w1, w2) · alpha / r, each whole or a product; r is the configuration's where no product has one."""
    for module, roles in _sound(found, draft):
        whole = roles.get("lokr_w2")
        if whole is not None and whole.ndim == 3:
            # peft 0.21.2 lokr/layer.py make_kron: only a w2 of four axes gets a w1 of as many; torch.kron then lays
            # w1's axes over the last two of w2, and the reshape to the weight's shape mixes inputs with the kernel.
            draft.say("LF-504", "a whole lokr_w2 of a Conv1d: PEFT forms another product than kron there", module)
            continue
        rank = next((roles[r].shape[0] for r in ("lokr_w2_b", "lokr_w1_b") if r in roles), None)
        rank = rank or (draft.config.rank(module) if draft.config else None)
        if rank is None:
            draft.say("LF-509", "both factors are whole and the configuration has no r: the scale is unknown", module)
            continue
        scale = draft.scale(module, rank)
        if scale is None:
            continue
        factors = {role: roles[role] for role in LOKR_ROLES - {"lokr_t2"} if role in roles}
        lokr = Lokr(scale[0], scale[1], **factors, t2=roles.get("lokr_t2"), r=rank)
        core = lokr.t2 if lokr.t2 is not None else whole
        _add(module, lokr, core.shape[2:] if core is not None else (), draft)


def _sound(found: Mapping[Name, Roles], draft: Draft) -> Iterator[tuple[str, Roles]]:
    for name, roles in sorted(found.items(), key=lambda item: item[0].module):
        if name.wrappers:
            draft.say("LF-506", "factors inside another adapted layer", name.module)
        elif draft.sound(name.module, roles):
            yield name.module, roles


def _add(module: str, part: Loha | Lokr, kernel: tuple[int, ...], draft: Draft) -> None:
    if why := part.fault():
        draft.say("LF-309", why, module)
        return
    place = None
    if kernel and kernel[-1] != 1:
        out, in_ = part.matrix_shape()
        place = Placement((out, in_ // math.prod(kernel), *kernel), (0,), tuple(range(1, len(kernel) + 2)))
    draft.add(f"{module}.weight", part, place, assumed=("name",))
