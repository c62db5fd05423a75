"""Megatron's names and Hugging Face's: query, key and value in one by groups of heads, gate and up in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from loraformat.errors import fault
from loraformat.naming.decoders import FIX, model_type, number, text_config
from loraformat.naming.links import Link, Seat, Share
from loraformat.naming.spaces import TORCH, Known
from loraformat.naming.templates import Templates, numbered
from loraformat_converters.megatron import NAMES
from loraformat_converters.megatron.settings import Heads, heads_of_model, heads_of_run

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["space"]

_LAYER, _OWN_LAYER = "model.layers.{}.", "decoder.layers.{}."
# Megatron-Bridge 0.6.2 models/llama/llama_bridge.py, qwen/qwen3_bridge.py, qwen/qwen3_moe_bridge.py and their like, and
# peft_bridge.py ADAPTER_NAME_MAP. What CanonicalLoRA adapts apart has a row of its own.
_WHOLE = {
    "self_attn.q_proj.weight": "self_attention.linear_q.weight",
    "self_attn.k_proj.weight": "self_attention.linear_k.weight",
    "self_attn.v_proj.weight": "self_attention.linear_v.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.gate_proj.weight": "mlp.linear_fc1_gate.weight",
    "mlp.up_proj.weight": "mlp.linear_fc1_up.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.gate.weight": "mlp.router.weight",
}
_TABLE = Templates([(_LAYER + torch, _OWN_LAYER + own) for torch, own in _WHOLE.items()])
_GATE, _UP = Share(0, 1, 2), Share(1, 2, 2)
_HALVES = {
    _GATE: Templates([(f"{_LAYER}mlp.gate_proj.weight", f"{_OWN_LAYER}mlp.linear_fc1.weight")]),
    _UP: Templates([(f"{_LAYER}mlp.up_proj.weight", f"{_OWN_LAYER}mlp.linear_fc1.weight")]),
}
# torch's leaf, the stack of all experts in Megatron's checkpoints, which of its rows
_EXPERT, _STACK = f"{_LAYER}mlp.experts.{{}}.{{leaf}}.weight", f"{_OWN_LAYER}mlp.experts.experts.{{module}}.weight"
_EXPERTS = (
    ("gate_proj", "linear_fc1", _GATE),
    ("up_proj", "linear_fc1", _UP),
    ("down_proj", "linear_fc2", None),
    ("gate_proj", "linear_fc1_gate", None),
    ("up_proj", "linear_fc1_up", None),
)
_QKV = Templates(
    [
        (f"{_LAYER}self_attn.{leaf}.weight", f"{_OWN_LAYER}self_attention.linear_qkv.weight")
        for leaf in ("q_proj", "k_proj", "v_proj")
    ]
)
_NUMBERS = ("num_local_experts", "num_experts")
_MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_PARTS = tuple(f"{name}.weight" for name in ("linear_q", "linear_k", "linear_v", "linear_fc1_gate", "linear_fc1_up"))
_EVIDENCE = "table: Megatron-Bridge"


class MegatronNames:
    """See ``loraformat.spaces.Space``."""

    name = NAMES
    describes = "Megatron's modules (decoder.layers.0.self_attention.linear_qkv)"

    def links(self, known: Known) -> Iterator[Link]:
        """By the bridge's own table, for models whose modules are called alike; the rows of query, key and value by the
        run's own numbers, or by the model's config.json."""
        model = model_type(known.config)
        if model not in _MODELS:
            what = f"what a module is called depends on the model, and model_type is {model!r}"
            fix = f"give --base DIR or --base config.json; known are {', '.join(_MODELS)}; or --names MAP"
            raise fault("LF-604", what, fix=fix)
        for key in dict.fromkeys(_torch_keys(known)):
            yield from _of(key, known)


def _torch_keys(known: Known) -> Iterator[str]:
    """The torch keys that matter: three for a query, key and value in one, two for a gate and an up; of each expert."""
    if known.names or known.adapter.names == TORCH:
        yield from known.torch_keys(lambda own: None)
        return
    for own in known.adapter:
        for table in (_TABLE, _QKV, *_HALVES.values()):
            yield from table.here(own)
        for leaf, module, _ in _EXPERTS:
            if match := numbered(_STACK.replace("{module}", module)).fullmatch(own):
                template = _EXPERT.replace("{leaf}", leaf)
                yield from (template.format(match[1], e) for e in range(_count(own, known)))


def _of(key: str, known: Known) -> Iterator[Link]:
    """To each module that holds the parameter; from torch's names, to those that Megatron itself has."""
    for own in _TABLE.there(key):
        if _meant(own, known):
            yield Link(Seat(key, axes="out,in"), Seat(own, axes="out,in"), _EVIDENCE)
    for share, table in _HALVES.items():
        for own in table.there(key):
            if _meant(own, known):
                yield Link(Seat(key, axes="out,in"), Seat(own, rows=share, axes="out,in"), _EVIDENCE)
    for own in _QKV.there(key):
        if _meant(own, known):
            yield _fused(key, own, known)
    for leaf, module, rows in _EXPERTS:
        match = numbered(_EXPERT.replace("{leaf}", leaf)).fullmatch(key)
        own = _STACK.format(match[1], module=module) if match else ""
        if match and _meant(own, known):
            seat = Seat(own, rows=rows, index=(int(match[2]), _count(own, known)), axes="batch,out,in")
            yield Link(Seat(key, axes="out,in"), seat, _EVIDENCE)


def _meant(own: str, known: Known) -> bool:
    """Whether the module is one of the adapter's; from torch's names, one that Megatron itself has."""
    return own in known.adapter if known.adapter.names != TORCH else not own.endswith(_PARTS)


def _count(own: str, known: Known) -> int:
    """How many experts there are: by the stack itself, else by the model's config.json."""
    shape = known.adapter[own].matrix_shape() if own in known.adapter else None
    return shape[0] if shape is not None and len(shape) == 3 else number(known.config, _NUMBERS, own)


def _fused(key: str, own: str, known: Known) -> Link:
    run, model = heads_of_run(known.adapter.extensions.get("megatron")), heads_of_model(text_config(known.config))
    if run is not None and model is not None and run != model:
        raise fault("LF-606", f"the run had {run}, the model has {model}", where=own, fix="is this the run's base?")
    heads = run or model
    if heads is None:
        raise fault("LF-604", "how many groups of heads the query, key and value are is not known", where=key, fix=FIX)
    rows = _rows(key.split(".")[-2], heads)
    width = text_config(known.config).get("hidden_size")
    shape = (heads.groups * (heads.queries + 2) * heads.size, width) if type(width) is int else None
    return Link(Seat(key, axes="out,in"), Seat(own, rows=rows, axes="out,in", shape=shape), f"config: {heads}")


def _rows(leaf: str, heads: Heads) -> npt.NDArray[np.intp]:
    """Of each group: its queries, its key, its value (Megatron-Core 0.19 transformer/attention.py)."""
    group = np.arange(heads.groups * (heads.queries + 2) * heads.size).reshape(heads.groups, -1, heads.size)
    blocks = {"q_proj": group[:, :-2], "k_proj": group[:, -2:-1], "v_proj": group[:, -1:]}
    return blocks[leaf].reshape(-1)


space = MegatronNames()
"""Megatron ↔ torch."""
