"""Keys: how a base parameter is named, and how a tensor of the file is named after it.

A key is the full name of the base parameter that changes (``model.layers.0.self_attn.q_proj.weight``),
opaque UTF-8. A tensor of the file is called ``<key>.<role>``; roles hold no dot, so the last dot separates
the two whatever the key looks like. In a model of several components the key begins with ``<component>:``.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

__all__ = [
    "NAME_SPACES", "ROLES", "components_of", "join", "key_fault", "name_space_fault", "nearest", "split", "split_role",
]  # fmt: skip

NAME_SPACES = ("torch", "mlx", "gguf", "flax", "keras", "kohya")
"""Name spaces known by a plain word; any other is a reverse-DNS name such as ``org.example.names``."""

_REVERSE_DNS = re.compile(r"[a-z][a-z0-9-]*(\.[a-z0-9][a-z0-9_-]*)+")
_COMPONENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IN_COMPONENT = re.compile(rf"({_COMPONENT.pattern}):(?!\d+$).")  # TensorFlow's ``kernel:0`` has none

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

ROLES = frozenset(
    {
        *("lora_A", "lora_B", "mid"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "t1", "t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        *("delta", "replace", "magnitude", "values", "indices", "sketch"),
    }
)
"""Every role that a tensor of the file can play."""


def key_fault(key: str) -> str | None:
    """Why ``key`` is no legal key, or None: non-empty, Unicode NFC, nothing that breaks or turns a line, no surrogates."""
    if not key:
        return "the key is empty"
    # A line break could forge a line of a log, a bidi override shows one name as another. The other format
    # characters are allowed: some scripts need their joiners.
    bad = next((c for c in key if unicodedata.category(c) in {"Cc", "Zl", "Zp", "Cs"} or c in _BIDI), None)
    if bad is not None:
        return f"the key holds the control character U+{ord(bad):04X}"
    if not unicodedata.is_normalized("NFC", key):
        return "the key is not in Unicode normalisation form C: two spellings of one name would be two targets"
    return None


def name_space_fault(names: str) -> str | None:
    """Why ``names`` is no legal name space, or None."""
    if names in NAME_SPACES or _REVERSE_DNS.fullmatch(names):
        return None
    return f"name space {names!r} is neither one of {', '.join(NAME_SPACES)} nor a reverse-DNS name"


def component_fault(component: str) -> str | None:
    """Why ``component`` is no legal component name, or None: an identifier, so that a colon ends it."""
    return None if _COMPONENT.fullmatch(component) else f"component {component!r} is not an identifier"


def split(key: str, components: Sequence[str]) -> tuple[str | None, str]:
    """A key as (component, parameter name); the component is None in a model of one component.

    >>> split("unet:conv_in.weight", ("unet", "text_encoder"))
    ('unet', 'conv_in.weight')
    """
    if not components:
        return None, key
    component, _, name = key.partition(":")
    return component, name


def components_of(keys: Iterable[str]) -> tuple[str, ...]:
    """The components that all keys name, sorted; none where a key names none.

    >>> components_of(["unet:conv_in.weight", "text_encoder:q.weight"]), components_of(["dense/kernel:0"])
    (('text_encoder', 'unet'), ())
    """
    found = {match[1] if (match := _IN_COMPONENT.match(key)) else "" for key in keys}
    return () if "" in found else tuple(sorted(found))


def join(component: str | None, name: str) -> str:
    """The key of a parameter ``name`` of ``component``."""
    return name if component is None else f"{component}:{name}"


def split_role(tensor: str) -> tuple[str, str]:
    """A tensor's name as (key, role): cut at the last dot.

    >>> split_role("lm_head.weight.lora_A")
    ('lm_head.weight', 'lora_A')
    """
    key, _, role = tensor.rpartition(".")
    return key, role


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like ``name``, best first: for "did you mean".

    >>> nearest("layers.1.qroj", [f"layers.{i}.{leaf}" for i in range(100) for leaf in ("q_proj", "o_proj")], 1)
    ['layers.1.q_proj']
    """
    import difflib  # slow to import, and needed only when something is wrong

    pool = list(names)
    if (
        len(pool) > _COMPARED
    ):  # a letter by letter comparison takes 0.3 ms: of 300 names with each of 200, half a minute
        own = _pairs(name)
        likeness = {other: len(own & pairs) / (len(own) + len(pairs)) for other in pool if (pairs := _pairs(other))}
        pool = heapq.nlargest(_COMPARED, likeness, key=likeness.__getitem__)
    return difflib.get_close_matches(name, pool, n=count, cutoff=0.5)


_COMPARED = 16


@lru_cache(1 << 16)
def _pairs(name: str) -> frozenset[str]:
    """Letters beside each other: two names that share many are perhaps alike."""
    return frozenset(name[i : i + 2] for i in range(len(name) - 1))
