"""How mlx-lm's names stand to torch's: the same, but for experts, which mlx-lm stacks.

Data for the models of which a test compares every name with a checkpoint of transformers (mlx-lm 0.32.2 models/*.py).
mlx-lm renames on loading only what this table says; a model that it changes in another way is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from loraformat.errors import fault
from loraformat.naming import decoders
from loraformat.naming.decoders import Decoder
from loraformat.naming.links import Link

if TYPE_CHECKING:
    from loraformat.naming.spaces import Known

__all__ = ["links"]

_ENDS = ("model.embed_tokens", "lm_head")
_QKV = tuple(f"self_attn.{leaf}_proj" for leaf in "qkv")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_LLAMA = (*_ATTENTION, *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")))
_SHARED = ("mlp.shared_expert_gate", *(f"mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")))


def _decoder(*modules: str, gate: str = "", projections: Mapping[str, str] | None = None) -> Decoder:
    """Modules of one name; with ``gate``, the path of the router, experts beside it (projection → that of mlx-lm)."""
    block, _, router = gate.rpartition(".")
    stacks = {leaf: f"{block}.switch_mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}
    experts = {f"{block}.experts.{{e}}.{leaf}": stacks[name] for leaf, name in (projections or {}).items()}
    stacked = {"mlp.experts.gate_up_proj": (stacks["gate"], stacks["up"]), "mlp.experts.down_proj": (stacks["down"],)}
    same = dict(zip(modules, modules, strict=True)) | ({gate: gate, f"mlp.{router}": gate} if gate else {})
    ends = dict(zip(_ENDS, _ENDS, strict=True))
    blocks = ("model.layers.{n}.", "model.layers.{n}.")
    return Decoder("table: mlx-lm", blocks, same, ends, experts, stacked if gate else {})


_QWEN = {f"{leaf}_proj": leaf for leaf in ("gate", "up", "down")}

_TABLE: Mapping[str, Decoder] = {
    **dict.fromkeys(
        ("llama", "mistral", "granite", "smollm3", "qwen2", "qwen3", "olmo2", "seed_oss"), _decoder(*_LLAMA)
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "cohere", "cohere2"), _decoder(*_LLAMA)),
    "phi3": _decoder("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "phi": _decoder(*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "starcoder2": _decoder(*_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
    "qwen2_moe": _decoder(*_LLAMA, *_SHARED, gate="mlp.gate", projections=_QWEN),
    "qwen3_moe": _decoder(*_LLAMA, gate="mlp.gate", projections=_QWEN),
    "mixtral": _decoder(
        *_ATTENTION, gate="block_sparse_moe.gate", projections={"w1": "gate", "w3": "up", "w2": "down"}
    ),
}
"""``model_type`` of a config.json → the names."""


def links(known: Known) -> Iterator[Link]:
    """The links of the adapter's keys. LF-604 where the model is not known, or how many experts it has."""
    told = decoders.model_type(known.config)
    if told is not None and told in _TABLE:
        return decoders.links(_TABLE[told], known)
    if told is None:
        raise fault("LF-604", "the model is not known, which tells its names in mlx-lm", fix=decoders.FIX)
    raise fault("LF-604", f"no table has the names of {told} in mlx-lm", fix="--names MAP for every target")
