"""litgpt's names and Hugging Face's: query, key and value in one, other words for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import fault
from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import Known
from loraformat.naming.templates import Templates
from loraformat_converters.litgpt import NAMES
from loraformat_converters.litgpt.heads import heads_of

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["space"]

_QKV = "transformer.h.{}.attn.qkv.weight"
# litgpt 0.5.13 scripts/convert_hf_checkpoint.py copy_weights_hf_llama: models with the MLP of Llama or Gemma
_TABLE = Templates(
    [
        ("model.embed_tokens.weight", "transformer.wte.weight"),
        ("model.layers.{}.self_attn.o_proj.weight", "transformer.h.{}.attn.proj.weight"),
        ("model.layers.{}.mlp.gate_proj.weight", "transformer.h.{}.mlp.fc_1.weight"),
        ("model.layers.{}.mlp.up_proj.weight", "transformer.h.{}.mlp.fc_2.weight"),
        ("model.layers.{}.mlp.down_proj.weight", "transformer.h.{}.mlp.proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ]
)
_FUSED = Templates([(f"model.layers.{{}}.self_attn.{leaf}.weight", _QKV) for leaf in ("q_proj", "k_proj", "v_proj")])


class LitgptNames:
    """See ``loraformat.spaces.Space``."""

    name = NAMES
    describes = "litgpt's modules (transformer.h.0.attn.qkv), query, key and value in one"

    def links(self, known: Known) -> Iterator[Link]:
        """By litgpt's own table; the rows of query, key and value by the model's config.json."""
        for key in _keys(known):
            for own in _TABLE.there(key):
                yield Link(Seat(key, axes="out,in"), Seat(own, axes="out,in"), "table: litgpt")
            for own in _FUSED.there(key):
                rows, total, evidence = _rows(key, known.config)
                shape = (total, known.config["hidden_size"]) if "hidden_size" in known.config else None
                yield Link(Seat(key, axes="out,in"), Seat(own, rows=rows, axes="out,in", shape=shape), evidence)


def _keys(known: Known) -> Iterator[str]:
    """The torch keys that matter: three for a fused one of litgpt's."""
    if known.names or known.adapter.names == "torch":
        yield from known.torch_keys(lambda own: None)
        return
    for own in known.adapter:
        yield from _TABLE.here(own)
        yield from _FUSED.here(own)


def _rows(key: str, config: Mapping[str, Any]) -> tuple[npt.NDArray[np.intp], int, str]:
    sizes = heads_of(config)
    if sizes is None:
        what = "query, key and value are one in litgpt, and how many rows each has is not known"
        raise fault("LF-604", what, where=key, fix="give --base DIR or --base config.json")
    query, other = sizes
    start = {"q_proj": 0, "k_proj": query, "v_proj": query + other}[key.split(".")[-2]]
    stop = start + (query if start == 0 else other)
    return np.arange(start, stop), query + 2 * other, f"config: {query} rows of q, {other} of k and v"


space = LitgptNames()
