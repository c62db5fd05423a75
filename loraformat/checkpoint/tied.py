"""Tied weights: an embedding and a head that are one tensor, stored under the embedding's name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["may_be_tied", "moving", "paired", "partner_names", "states", "tied", "unties", "vocabulary"]

# transformers 5.23.0, _tied_weights_keys of every model: the embedding → the heads that may be tied to it, the
# usual one first. A base has at most one of the heads.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("lm_head.weight", "head.decoder.weight"),
    "model.language_model.embed_tokens.weight": ("lm_head.weight",),
    "language_model.model.embed_tokens.weight": ("language_model.lm_head.weight",),
    "model.text_model.embed_tokens.weight": ("lm_head.weight",),
    "text_model.model.embed_tokens.weight": ("text_model.lm_head.weight",),
    "model.decoder.embed_tokens.weight": (
        *("lm_head.weight", "proj_out.weight", "output_projection.weight", "lm_head.out_proj.weight"),
    ),
    "model.embed_tokens.embed_tokens.weight": ("lm_head.weight",),
    "transformer.wte.weight": ("lm_head.weight",),
    "transformer.word_embeddings.weight": ("lm_head.weight",),
    "transformer.tokens_embed.weight": ("lm_head.weight",),
    "transformer.word_embedding.weight": ("lm_loss.weight",),
    "transformer.embeddings.weight": ("pred_layer.proj.weight",),
    "backbone.embeddings.weight": ("lm_head.weight",),
    "rwkv.embeddings.weight": ("head.weight",),
    "gpt_neox.embed_in.weight": ("lm_head.weight", "embed_out.weight"),
    "biogpt.embed_tokens.weight": ("output_projection.weight",),
    "bert.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",),
    "roberta.embeddings.word_embeddings.weight": ("lm_head.decoder.weight",),
    "esm.embeddings.word_embeddings.weight": ("lm_head.decoder.weight",),
    "distilbert.embeddings.word_embeddings.weight": ("vocab_projector.weight",),
    "electra.embeddings.word_embeddings.weight": ("generator_lm_head.weight",),
    "convbert.embeddings.word_embeddings.weight": ("generator_lm_head.weight",),
    "funnel.embeddings.word_embeddings.weight": ("lm_head.weight",),
    "model.embeddings.tok_embeddings.weight": ("decoder.weight",),
    # Encoder–decoders tie more than two: see ``partner_names``.
    "shared.weight": ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    "model.shared.weight": (
        *("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    ),
}
_BY_TYPE: Mapping[str, str] = {
    "whisper": "proj_out.weight",
    "speech_to_text": "lm_head.weight",
    "gpt_neox_japanese": "embed_out.weight",
}
# What a class without a language-model head is called; the head's own class has "LMHead" or "For…LM" in its name.
_HEADLESS = ("Model", "Encoder", "Classification", "Regression", "QuestionAnswering", "MultipleChoice", "Embedding")
_NESTED = ("text_config", "decoder", "llm_config", "language_config")


def _configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configuration and those of the text model inside it, as they may state the tie."""
    inner = (config.get(name) for name in _NESTED)
    return [c for c in (config, *inner) if isinstance(c, dict)]


def states(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties, where it says; transformers 5.23 looks at the outer one."""
    said = [c["tie_word_embeddings"] for c in _configs(config) if isinstance(c.get("tie_word_embeddings"), bool)]
    return said[0] if said else None


def _headless(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return False
    return all(isinstance(n, str) and n.endswith(_HEADLESS) and "LMHead" not in n for n in names)


def partner_names(embedding: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The heads that could be tied to an embedding; several for an encoder–decoder, which ties them all."""
    heads = _HEADS.get(embedding, ())
    if embedding.endswith("shared.weight"):
        return heads
    usual = _BY_TYPE.get(str(config.get("model_type")))
    return (usual,) if usual in heads else heads[:1]


def tied(names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """A name that is not stored → the stored tensor that it is tied to.

    A missing head is evidence, unless the configuration says that nothing is tied, or its class has no such head.
    """
    if states(config) is False:
        return {}
    stored = [e for e in _HEADS if e in names and (e.endswith("shared.weight") or not _headless(config))]
    return {head: e for e in stored for head in partner_names(e, config) if head not in names}


def paired(names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Head → embedding where both are stored and the configuration ties them: equal values are tied on loading."""
    if not states(config):
        return {}
    return {head: e for e in _HEADS if e in names for head in partner_names(e, config) if head in names}


def moving(update: Update, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The kinds of parts that change a tensor of ``shape``, and so every module that is tied to it.

    peft 0.21.2 ties trained tokens as the model ties its weights; and a vocabulary of another size is one for the
    embedding and its head. Any other change is of the one module: its partner keeps the tensor as it was.

    Args:
        shape: of the stored tensor.
    """
    resized = "replace" in update and update["replace"].replace.shape != shape
    kinds = tuple(part.kind for part in update.parts)
    if all(kind == "rows" or (kind == "replace" and resized) for kind in kinds):
        return kinds
    return ("replace",) if resized else ()


def trained_apart(update: Update) -> bool:
    """Whether the replacement was trained as a module of its own, so that it is not what a tied module holds.

    PEFT's reader lets such a one be added too; an embedding that was saved because it is another size is the tensor that
    both modules share (peft 0.21.2 ``save_embedding_layers``).
    """
    return "replace" in update and "add" in update["replace"].allows


def may_be_tied(name: str, rows: int, names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a tensor with a row for each token is tied, as the configuration has it, to one that the table lacks."""
    if not states(config) or _headless(config) or rows not in {c.get("vocab_size") for c in _configs(config)}:
        return False
    pairs = {**tied(names, config), **paired(names, config)}
    return name not in pairs and name not in pairs.values()


def unties(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with ``tie_word_embeddings`` false, wherever it said otherwise, and in any case outside."""
    changed = dict(config)
    for name in _NESTED:
        inner = changed.get(name)
        if isinstance(inner, dict) and inner.get("tie_word_embeddings"):
            changed[name] = {**inner, "tie_word_embeddings": False}
    return {**changed, "tie_word_embeddings": False}


def vocabulary(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The configuration with ``vocab_size`` as it is now, wherever it said the old number."""
    changed = dict(config)
    for name in _NESTED:
        inner = changed.get(name)
        if isinstance(inner, dict) and inner.get("vocab_size") == old:
            changed[name] = {**inner, "vocab_size": new}
    return {**changed, "vocab_size": new} if changed.get("vocab_size") == old else changed
