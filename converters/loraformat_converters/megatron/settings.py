"""``run_config.yaml``: what the run says of its adapters and of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraformat.errors import fault
from loraformat.faults import brief, is_number, is_rank
from loraformat.plain_yaml import scalars, section

__all__ = ["CONFIG", "Heads", "Method", "heads_of_model", "heads_of_run", "method_of"]

CONFIG = "run_config.yaml"

_MOST = 1 << 20  # rows; what states more would only have zeros allocated
# Megatron-Bridge 0.6.2 peft/: each computes alpha / dim, dim being the rows of linear_in
_METHODS = ("lora.LoRA", "lora.VLMLoRA", "canonical_lora.CanonicalLoRA", "dora.DoRA")


@dataclass(frozen=True, slots=True)
class Method:
    """How the adapters were trained.

    Attributes:
        alpha: None where it is that of every rank itself, a scale of 1.
        dim: the rank.
        expert_dim: the rank of experts; None where it is another one of each model.
    """

    alpha: float | None
    dim: int
    expert_dim: int | None


@dataclass(frozen=True, slots=True)
class Heads:
    """The rows of a fused query, key and value: ``groups`` times the queries of a group, its key, its value."""

    groups: int
    queries: int
    size: int

    def __str__(self) -> str:
        return f"{self.groups} groups of {self.queries} queries of {self.size}"


def method_of(text: str | None) -> Method | None:
    """The section ``peft``; None where there is none.

    Raises:
        LoraFormatError: LF-503 no rank or no alpha; LF-504 a method that is not known.
    """
    said = scalars(section(text, "peft"))
    if not said:
        return None
    target = str(said.get("_target_"))
    if not target.endswith(tuple(f".peft.{method}" for method in _METHODS)):
        raise fault("LF-504", f"the method {target} is not known", where=CONFIG)
    dim, alpha = said.get("dim"), said.get("alpha")
    if not is_rank(dim) or not (is_number(alpha) or alpha == "null"):
        raise fault(
            "LF-503", f"dim and alpha are {brief(dim)} and {brief(alpha)}, not a rank and a number", where=CONFIG
        )
    return Method(None if alpha == "null" else alpha, dim, None if said.get("normalize_moe_lora") else dim)


def heads_of_run(text: str | None) -> Heads | None:
    """By the section ``model``; None where it does not say."""
    said = scalars(section(text, "model"))
    heads, groups = said.get("num_attention_heads"), said.get("num_query_groups")
    return _heads(heads, heads if groups == "null" else groups, said.get("kv_channels"))


def heads_of_model(config: Mapping[str, Any]) -> Heads | None:
    """By the ``config.json`` of Hugging Face; None where it does not say."""
    heads, width, size = (config.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    if size is None and type(width) is int and type(heads) is int and heads > 0:
        size = width // heads
    return _heads(heads, config.get("num_key_value_heads", heads), size)


def _heads(heads: Any, groups: Any, size: Any) -> Heads | None:
    if type(heads) is not int or type(groups) is not int or type(size) is not int:
        return None
    if min(heads, groups, size) < 1 or heads % groups or heads * size > _MOST:
        return None
    return Heads(groups, heads // groups, size)
