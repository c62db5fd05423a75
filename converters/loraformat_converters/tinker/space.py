"""Tinker's names and Hugging Face's: the head, and experts one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loraformat.errors import fault
from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known
from loraformat_converters.tinker import NAMES

__all__ = ["space"]

# tinker-cookbook 0.6.1 weights/_merge.py expert_key_remaps, of models whose experts are stored one by one
_LEAVES: Mapping[str, str] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MODELS = ("qwen3", "qwen3_moe", "llama")
_STACK = re.compile(r"(.*\.experts)\.(w[123])\.weight")
_HEAD = "model.unembed_tokens.weight"


class TinkerNames:
    """See ``loraformat.spaces.Space``."""

    name = NAMES
    describes = "Tinker's modules (model.unembed_tokens, experts.w1)"

    def links(self, known: Known) -> Iterator[Link]:
        """By the table of Tinker's own export, for models whose modules are called alike; others are refused (LF-604)."""
        model = known.config.get("model_type")
        if model not in _MODELS:
            what = f"how Tinker calls a module depends on the model, and model_type is {model!r}"
            fix = f"give --base DIR or --base config.json; known are {', '.join(_MODELS)}; or --names MAP"
            raise fault("LF-604", what, fix=fix)
        if known.adapter.names != TORCH:
            for own in known.adapter:
                yield from _of(own, known)

    # Towards Tinker nothing leads: the layout is not written.


def _of(own: str, known: Known) -> Iterator[Link]:
    evidence = "table: tinker-cookbook"
    if own == _HEAD:
        if not known.config.get("tie_word_embeddings"):  # tied, the change is of the embedding too
            yield Link(Seat("lm_head.weight", axes="out,in"), Seat(own, axes="out,in"), evidence)
    elif match := _STACK.fullmatch(own):
        shape = known.adapter[own].matrix_shape()
        count = shape[0] if shape is not None and len(shape) == 3 else 0
        for i in range(count):
            here = f"{match[1]}.{i}.{_LEAVES[match[2]]}.weight"
            yield Link(Seat(here, axes="out,in"), Seat(own, index=(i, count), axes="batch,out,in"), evidence)
    else:
        yield Link(Seat(own, axes="out,in"), Seat(own, axes="out,in"), evidence)


space = TinkerNames()
