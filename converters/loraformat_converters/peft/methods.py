"""PEFT's methods (the ``peft_type`` of a configuration): which are read, and why the others are not.

Each reason was read off the method's ``layer.py`` in peft 0.21.2: ``get_delta_weight``, ``merge``, ``forward``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["READ", "why_not"]

READ = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "TRAINABLE_TOKENS")

_PROMPTS = "trains prompts or prefixes: no weight of the base changes"
_MULTIPLIES = "multiplies the base weight: there is no ΔW without it"
_OF_BASE = "makes ΔW from the base weight itself: there is none without it"
_OTHER = "makes ΔW in another way than by factors, which is not read"
_ROUTES = "decides by the input what is added: no one ΔW says that"

_REASONS: Mapping[str, str] = {
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"), _PROMPTS),
    **dict.fromkeys(("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"), _PROMPTS),
    **dict.fromkeys(("BOFT", "GLORA", "HIRA", "HRA", "IA3", "OFT", "ROAD"), _MULTIPLIES),
    "DEFT": f"{_OF_BASE} (it removes a projection of W)",
    "FROD": f"{_OF_BASE} (its factors are the whole new weight)",
    "OSF": f"{_OF_BASE} (it trains the lower singular vectors of W)",
    "PEANUT": f"{_OF_BASE} (a small network turns W into ΔW)",
    "PSOFT": f"{_OF_BASE} (it rotates within the principal subspace of W)",
    "ADAMSS": f"{_OTHER} (products within subspaces of W's rows)",
    "C3A": f"{_OTHER} (circulant blocks)",
    "DELORA": f"{_OTHER} (factors scaled by their own norms and by those of W's columns)",
    "FOURIERFT": f"{_OTHER} (a sparse spectrum, by a Fourier transform)",
    "GRALORA": f"{_OTHER} (a product for each block of W)",
    "MISS": f"{_OTHER} (one block repeated along the input, multiplied by W with init_weights=bat)",
    "RANDLORA": f"{_OTHER} (a sum of scaled random bases)",
    "SHIRA": f"{_OTHER} (single entries of W)",
    "SUPERTUNING": f"{_OTHER} (single entries of W, chosen by its magnitudes)",
    "TINYLORA": f"{_OTHER} (a few numbers between the singular vectors of W)",
    "UNILORA": f"{_OTHER} (factors drawn from one shared vector)",
    "VBLORA": f"{_OTHER} (factors mixed from a shared bank of vectors)",
    "WAVEFT": f"{_OTHER} (a sparse spectrum, by a wavelet transform)",
    "LILY": f"{_ROUTES} (a router mixes the experts)",
    "POLY": f"{_ROUTES} (a router mixes the skills of a task)",
    "XLORA": f"{_ROUTES} (a classifier scales several adapters)",
    "PVERA": "has a mean and a spread for what it adds, half of its factors for each: not read",
    "BEFT": "trains one more bias behind a module: not read",
    "LN_TUNING": "trains whole normalisation layers: not read",
    "SHADOW": "runs a second network beside the model: no weight of the base changes",
}


def why_not(kind: Any) -> str | None:
    """Why a ``peft_type`` is not read, or None if it is."""
    if kind in READ:
        return None
    if not isinstance(kind, str):
        return "says nothing: PEFT writes the method's name there"
    return _REASONS.get(kind, "is no method of peft 0.21.2, and is not read")
