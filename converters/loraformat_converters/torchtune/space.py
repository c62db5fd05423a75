"""torchtune's names and Hugging Face's: other words, and for some models other rows of q and k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.errors import fault
from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import Known
from loraformat.naming.templates import Templates
from loraformat_converters.torchtune import NAMES
from loraformat_converters.torchtune.rotary import pairs_of_halves

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["space"]

# torchtune 0.6.1 models/convert_weights.py _FROM_HF; the same modules in qwen2 and gemma2
_TABLE = Templates(
    [
        ("model.embed_tokens.weight", "tok_embeddings.weight"),
        ("model.layers.{}.self_attn.q_proj.weight", "layers.{}.attn.q_proj.weight"),
        ("model.layers.{}.self_attn.k_proj.weight", "layers.{}.attn.k_proj.weight"),
        ("model.layers.{}.self_attn.v_proj.weight", "layers.{}.attn.v_proj.weight"),
        ("model.layers.{}.self_attn.o_proj.weight", "layers.{}.attn.output_proj.weight"),
        ("model.layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.w1.weight"),
        ("model.layers.{}.mlp.down_proj.weight", "layers.{}.mlp.w2.weight"),
        ("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp.w3.weight"),
        ("lm_head.weight", "output.weight"),
    ]
)
# Whether a model's rows of q and k are in another order (its *_tune_to_hf); phi3 and the vision models have other modules.
_PERMUTED: Mapping[str, bool] = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}


class TorchtuneNames:
    """See ``loraformat.spaces.Space``."""

    name = NAMES
    describes = "torchtune's modules (layers.0.attn.output_proj), rows of q and k in its rotary order"

    def links(self, known: Known) -> Iterator[Link]:
        """By torchtune's own table; the order of rows by the model's config.json, without which q and k are refused."""
        orders = _Orders(known.config)
        for key in known.torch_keys(lambda own: next(_TABLE.here(own), None)):
            for own in _TABLE.there(key):
                rows, evidence = orders.of(key)
                yield Link(Seat(key, axes="out,in"), Seat(own, rows=rows, axes="out,in"), evidence)


class _Orders:
    """The order of rows of q and k, of one model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def of(self, key: str) -> tuple[npt.NDArray[np.intp] | None, str]:
        """(rows of torchtune's tensor for each row of Hugging Face's, or None, the evidence); LF-604 where not known."""
        leaf = key.split(".")[-2]
        if leaf not in ("q_proj", "k_proj"):
            return None, "table: torchtune"
        model = self.config.get("model_type")
        permuted = _PERMUTED.get(model) if isinstance(model, str) else None
        if permuted is None:
            what = f"the rows of q and k may lie in another order, and model_type is {model!r}"
            fix = f"give --base DIR or --base config.json; known are {', '.join(sorted(_PERMUTED))}"
            raise fault("LF-604", what, where=key, fix=fix)
        if not permuted:
            return None, f"table: torchtune, {model}"
        heads, size = self._heads(key, "num_attention_heads" if leaf == "q_proj" else "num_key_value_heads")
        return pairs_of_halves(heads, size), f"config: {heads} heads of {size}"

    def _heads(self, key: str, name: str) -> tuple[int, int]:
        all_heads = self.config.get("num_attention_heads")
        heads, width = self.config.get(name, all_heads), self.config.get("hidden_size")
        size = self.config.get("head_dim")
        if size is None and isinstance(width, int) and isinstance(all_heads, int) and all_heads:
            size = width // all_heads
        if not isinstance(heads, int) or not isinstance(size, int) or min(heads, size) < 1 or size % 2:
            what = f"config.json states {heads!r} heads of {size!r}"
            raise fault("LF-604", what, where=key, fix="give --base config.json")
        return heads, size


space = TorchtuneNames()
