"""Tinker's names and Hugging Face's: the head, and experts one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loraformat.errors import fault
from loraformat.naming.decoders import FIX, number
from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known
from loraformat_converters.tinker import NAMES

__all__ = ["space"]

# tinker-cookbook 0.6.1 weights/_merge.py expert_key_remaps, of models whose experts are stored one by one
_LEAVES: Mapping[str, str] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MODELS = ("qwen3", "qwen3_moe", "llama")
_STACK = re.compile(r"(.*\.experts)\.(w[123])\.weight")
_STACKS = {leaf: own for own, leaf in _LEAVES.items()}
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,5})\.(\w+)\.weight")
_HEAD = "model.unembed_tokens.weight"
_EVIDENCE = "table: tinker-cookbook"


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
        for key in known.adapter:
            yield from (_there(key, known) if known.adapter.names == TORCH else _of(key, known))


def _of(own: str, known: Known) -> Iterator[Link]:
    if own == _HEAD:
        if not known.config.get("tie_word_embeddings"):  # tied, the change is of the embedding too
            yield Link(Seat("lm_head.weight", axes="out,in"), Seat(own, axes="out,in"), _EVIDENCE)
    elif match := _STACK.fullmatch(own):
        shape = known.adapter[own].matrix_shape()
        count = shape[0] if shape is not None and len(shape) == 3 else 0
        for i in range(count):
            here = f"{match[1]}.{i}.{_LEAVES[match[2]]}.weight"
            yield Link(Seat(here, axes="out,in"), Seat(own, index=(i, count), axes="batch,out,in"), _EVIDENCE)
    else:
        yield Link(Seat(own, axes="out,in"), Seat(own, axes="out,in"), _EVIDENCE)


def _there(key: str, known: Known) -> Iterator[Link]:
    """The link of a torch key; none of a head that is the embedding, which Tinker's change of it would change too."""
    if key == "lm_head.weight" and known.config.get("tie_word_embeddings"):
        return
    match = _EXPERT.fullmatch(key)
    own = _HEAD if key == "lm_head.weight" else key
    seat = Seat(own, axes="out,in")
    if match is not None and match[3] in _STACKS:
        count = number(known.config, ("num_local_experts", "num_experts", "n_routed_experts"), key)
        if int(match[2]) >= count:
            raise fault("LF-606", f"expert {match[2]} of a model with {count}", where=key, fix=FIX)
        seat = Seat(f"{match[1]}.{_STACKS[match[3]]}.weight", index=(int(match[2]), count), axes="batch,out,in")
    yield Link(Seat(key, axes="out,in"), seat, _EVIDENCE)


space = TinkerNames()
