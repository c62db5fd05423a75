"""A file's tensors → Adapter: every tensor understood, every scale stated or said to be assumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.layout import Reading, ReadOptions
from loraformat_converters.kohya import header, magnitudes, names, split
from loraformat_converters.kohya.draft import Draft
from loraformat_converters.kohya.factors import METHODS, Factors, Method, vector
from loraformat_converters.kohya.header import AlphaForm, Kept

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["read"]

_BIASES = ("diff_b", "b_norm")


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter in a file of kohya or LyCORIS.

    Keys are ``<module>.weight`` and ``.bias``, the module as the file spells it, in the name space ``kohya``.

    Raises:
        LoraFormatError: LF-3xx the tensors do not fit each other; LF-504 … LF-507 see ``loraformat.rules``.
    """
    draft = Draft(options)
    modules = _modules(source.tensors, draft)
    for module, roles in sorted(modules.items()):
        if draft.sound(module, roles):
            _module(module, roles, draft)
    split.look(source.header, draft)
    idle = [key for key, u in draft.updates.items() if "lokr" in u and u["lokr"].r is None]
    if idle and header.trained_with(source.header, "rs_lora"):
        # lycoris-lora 4.1.3 modules/lokr.py: alpha = r, and scale = alpha / √r, until the file is loaded
        what = f"{len(idle)} LoKrs of two whole factors were trained with rs_lora at scale √r; every reader takes 1"
        draft.warn("LF-507", what, idle[0])
    if missing := draft.without_alpha:
        what = f"{len(missing)} modules have no alpha: read as the rank, scale 1, as sd-scripts and ComfyUI do"
        draft.warn("LF-509", what, missing[0], "if it is known: --alpha A")
    updates = draft.checked(str(source.path))
    alphas = {module: _form(roles) for module, roles in modules.items() if "alpha" in roles}
    axes = {m: roles["dora_scale"].ndim for m, roles in modules.items() if _flat(updates.get(f"{m}.weight"), roles)}
    adapter = Adapter(
        updates,
        "kohya",
        base_model=header.base_model(source.header),
        about=header.about(source.header),
        extensions={"kohya": Kept(source.header, alphas, axes).text},
    )
    return Reading(adapter, draft.warnings)


def _form(roles: Roles) -> AlphaForm:
    """How the alpha was stored, with its value where two whole factors leave it without a meaning."""
    idle = "lokr_w1" in roles and "lokr_w2" in roles
    return AlphaForm.of(roles["alpha"], float(roles["alpha"].reshape(-1)[0]) if idle else None)


def _flat(update: Update | None, roles: Roles) -> bool:
    """Whether a kernel is flattened into a factor, and only dora_scale has the axes of the weight."""
    return update is not None and "dora_scale" in roles and update.placement is None


def _modules(tensors: Mapping[str, Array], draft: Draft) -> dict[str, Roles]:
    """Module → role → tensor; a name that has no place is a problem, of one kind said once."""
    found: dict[str, Roles] = {}
    refused: dict[str, list[str]] = {}
    for key in tensors:
        what = names.refused(key)
        if what is None and key.endswith(".weight") and f"{key.removesuffix('.weight')}.on_input" in tensors:
            what = names.refused(f"{key.removesuffix('.weight')}.on_input")
        if what is not None:
            refused.setdefault(what, []).append(key)
        elif (name := names.parse(key)) is None:
            draft.say("LF-506", "the name ends with no role of this layout", key, "another layout, or a newer tool?")
        elif name.role in (roles := found.setdefault(name.module, {})):
            draft.say("LF-506", f"the module has a second {names.SPELLED[name.role]}", key)
        else:
            roles[name.role] = tensors[key]
    paths = (key.split(".") for keys in refused.values() for key in keys)
    known = {".".join(path[:length]) for path in paths for length in range(1, len(path))}
    for what, keys in refused.items():
        more = f", as {len(keys) - 1} more are" if len(keys) > 1 else ""
        draft.say("LF-504", f"the tensor is of {what}{more}", keys[0])
    return {module: roles for module, roles in found.items() if module not in known}


def _module(module: str, roles: Roles, draft: Draft) -> None:
    """The updates of a module's weight and bias."""
    biases = [role for role in _BIASES if role in roles]
    if len(biases) > 1:
        draft.say("LF-506", "diff_b and b_norm: which is the bias's?", module)
    for role in biases[:1]:
        if bias := vector(module, roles, role, draft):
            draft.add(f"{module}.bias", bias.part, bias.place)
    rest = {role: tensor for role, tensor in roles.items() if role not in _BIASES}
    if not rest:
        return
    method = _method(module, rest, draft)
    factors = method.read(module, rest, draft) if method is not None else None
    if factors is not None:
        _add(module, factors, rest, draft)


def _method(module: str, roles: Roles, draft: Draft) -> Method | None:
    """The only method whose tensors these are, complete."""
    own = {name for name, m in METHODS.items() if roles.keys() & ((m.needs | m.may) - {"alpha", "dora_scale"})}
    if len(own) > 1:
        # lycoris-lora 4.1.3 get_module takes the first that it knows; ComfyUI load_lora the last.
        what = f"tensors of {' and '.join(sorted(own))} for one weight: a reader takes one of them, not the sum"
        draft.say("LF-506", what, module)
        return None
    if not own:
        draft.say("LF-303", f"{', '.join(map(_spelled, sorted(roles)))} without any factor", module, "is it whole?")
        return None
    method = METHODS[own.pop()]
    if missing := sorted(method.needs - roles.keys()):
        draft.say("LF-303", f"{', '.join(map(_spelled, missing))} is missing", module, "the file is incomplete")
        return None
    if stray := sorted(roles.keys() - method.needs - method.may):
        draft.say("LF-506", f"{', '.join(map(_spelled, stray))}: no reader of these factors looks at it", module)
        return None
    return method


def _spelled(role: str) -> str:
    return names.SPELLED[role]


def _add(module: str, factors: Factors, roles: Roles, draft: Draft) -> None:
    key, place = f"{module}.weight", factors.place
    if "dora_scale" in roles:
        found = magnitudes.read(module, roles["dora_scale"], factors.part, place, draft)
        if found is None:
            return
        magnitude, place = found
        draft.add(key, factors.part, place, assumed=factors.assumed)
        draft.add(key, magnitude, place)
    else:
        draft.add(key, factors.part, place, assumed=factors.assumed)
