"""What families of models call their parameters in JAX, as data: names, axes, stacked and fused tensors beside torch's.

Taken from the projects' own converters, and compared with what those do:

- Tunix (google/tunix c7d8950): models/llama3, qwen2, qwen3/params.py; models/gemma, gemma3/params_safetensors.py;
- DeepMind's gemma 3.3.0: gm/nn/_modules.py, whose numbers Tunix's Gemma has too, but for the two projections of the MLP;
- MaxText (AI-Hypercomputer/maxtext e591f30): checkpoint_conversion/utils/param_mapping.py, layers apart or scanned.

MaxText's query of some models is W / √head_dim, and its rows of q and k may lie in pairs: see ``maxtext``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loraformat.naming.links import Share

__all__ = ["TABLES", "Row", "Table"]


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter; ``#`` in a name stands for the number of the layer.

    Attributes:
        torch, own: what it is called; an own name without ``#`` of a layer is that of all layers, stacked.
        axes: how the matrix lies in the own tensor.
        sizes: of the own tensor's axes: words of ``space.Sizes``, or numbers.
        share: the rows of the own tensor that torch's is.
        projection: ``q`` or ``k``, where rotary embeddings and scales matter.
        layers: (step, first): the own layer i is torch's layer step · i + first.
        block: the own layers are those that a scan of blocks of so many leaves over; 0: not.
        shared: whether Linen's rule has the own name too.
    """

    torch: str
    own: str
    axes: str
    sizes: str
    share: Share | None = None
    projection: str = ""
    layers: tuple[int, int] = (1, 0)
    block: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A family in one project.

    Attributes:
        evidence: what says so.
        models: ``model_type`` of the models that have these names.
        rows: its parameters.
        by_base: whether only a base under these names tells that a torch parameter is called so.
    """

    evidence: str
    models: frozenset[str]
    rows: tuple[Row, ...]
    by_base: bool = False


_GEMMA = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})
_PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})

_HALVES = (Share(0, 1, 2), Share(1, 2, 2))
_THIRDS = (Share(0, 1, 3), Share(1, 2, 3), Share(2, 3, 3))

_ATTENTION, _MLP = "model.layers.#.self_attn", "model.layers.#.mlp"
_EMBEDDING = Row("model.embed_tokens.weight", "embedder/input_embedding", "in,out", "vocabulary hidden")

_TUNIX_MLP = (
    Row(f"{_MLP}.gate_proj.weight", "layers/#/mlp/gate_proj/kernel", "in,out", "hidden inner", shared=True),
    Row(f"{_MLP}.up_proj.weight", "layers/#/mlp/up_proj/kernel", "in,out", "hidden inner", shared=True),
    Row(f"{_MLP}.down_proj.weight", "layers/#/mlp/down_proj/kernel", "in,out", "inner hidden", shared=True),
)


def _norms(pairs: Mapping[str, str], shared: bool = False) -> tuple[Row, ...]:
    return tuple(Row(f"{torch}.weight", own, "out", "", shared=shared) for torch, own in pairs.items())


def _gemma_attention(layer: str) -> tuple[Row, ...]:
    """q, k and v in one einsum where there are as many heads of each, else in two."""
    q, k, v, o = (f"{_ATTENTION}.{name}_proj.weight" for name in "qkvo")
    fused = ("out,out,in,out", "3 heads hidden head")
    apart = ("out,out,in,out", "2 kv hidden head")
    return (
        *(Row(n, f"{layer}/attn/qkv_einsum/w", *fused, share) for n, share in zip((q, k, v), _THIRDS, strict=True)),
        Row(q, f"{layer}/attn/q_einsum/w", "out,in,out", "heads hidden head"),
        *(Row(n, f"{layer}/attn/kv_einsum/w", *apart, share) for n, share in zip((k, v), _HALVES, strict=True)),
        Row(o, f"{layer}/attn/attn_vec_einsum/w", "in,in,out", "heads head hidden"),
        *_norms({f"{_ATTENTION}.{name[0]}_norm": f"{layer}/attn/_{name}_norm/scale" for name in ("query", "key")}),
    )


def _gemma_norms(layer: str, after: str) -> tuple[Row, ...]:
    block = "model.layers.#"
    names = {
        f"{block}.input_layernorm": f"{layer}/pre_attention_norm/scale",
        f"{block}.post_attention_layernorm": f"{layer}/{after}/scale",
        f"{block}.pre_feedforward_layernorm": f"{layer}/pre_ffw_norm/scale",
        f"{block}.post_feedforward_layernorm": f"{layer}/post_ffw_norm/scale",
    }
    return _norms(names)


def _gating() -> tuple[Row, ...]:
    """gate and up in one einsum, which lies in two ways: gm/nn/_modules.py, transpose_gating_einsum."""
    return tuple(
        Row(f"{_MLP}.{name}_proj.weight", "layer_#/mlp/gating_einsum", axes, sizes, share)
        for axes, sizes in (("out,in,out", "2 hidden inner"), ("out,out,in", "2 inner hidden"))
        for name, share in zip(("gate", "up"), _HALVES, strict=True)
    )


_TUNIX = Table(
    "table: tunix",
    _PLAIN,
    (
        _EMBEDDING,
        *(
            Row(
                f"{_ATTENTION}.{name}_proj.weight", f"layers/#/attn/{name}_proj/w", "in,out,out", f"hidden {heads} head"
            )
            for name, heads in (("q", "heads"), ("k", "kv"), ("v", "kv"))
        ),
        Row(f"{_ATTENTION}.o_proj.weight", "layers/#/attn/o_proj/w", "in,in,out", "heads head hidden"),
        *_TUNIX_MLP,
        *_norms(
            {
                f"{_ATTENTION}.q_norm": "layers/#/attn/q_norm/w",
                f"{_ATTENTION}.k_norm": "layers/#/attn/k_norm/w",
                "model.layers.#.input_layernorm": "layers/#/input_layernorm/w",
                "model.layers.#.post_attention_layernorm": "layers/#/post_attention_layernorm/w",
                "model.norm": "final_norm/w",
            }
        ),
        Row("lm_head.weight", "lm_head/w", "in,out", "hidden vocabulary"),
    ),
)
_TUNIX_GEMMA = Table(
    "table: tunix gemma",
    _GEMMA,
    (
        _EMBEDDING,
        *_gemma_attention("layers/#"),
        *_TUNIX_MLP,
        *_gemma_norms("layers/#", "post_attention_norm"),
        *_gemma_norms("layers/#", "post_attn_norm")[1:2],
        *_norms({"model.norm": "final_norm/scale"}, shared=True),
    ),
)
_DEEPMIND = Table(
    "table: gemma",
    _GEMMA,
    (
        _EMBEDDING,
        *_gemma_attention("layer_#"),
        *_gating(),
        Row(f"{_MLP}.down_proj.weight", "layer_#/mlp/linear", "in,out", "inner hidden"),
        *_gemma_norms("layer_#", "post_attention_norm"),
        *_norms({"model.norm": "final_norm/scale"}, shared=True),
    ),
)


def _maxtext(layer: str, layers: tuple[int, int] = (1, 0), end: str = "") -> tuple[Row, ...]:
    """One layer's projections; ``end`` is of a model whose blocks hold a local and a global layer."""
    attention, mlp = f"{layer}/self_attention{end}", f"{layer}/mlp{end}"
    rows = (
        Row(
            f"{_ATTENTION}.q_proj.weight",
            f"{attention}/query/kernel",
            "in,out,out",
            "hidden heads head",
            projection="q",
        ),
        Row(f"{_ATTENTION}.k_proj.weight", f"{attention}/key/kernel", "in,out,out", "hidden kv head", projection="k"),
        Row(f"{_ATTENTION}.v_proj.weight", f"{attention}/value/kernel", "in,out,out", "hidden kv head"),
        Row(f"{_ATTENTION}.o_proj.weight", f"{attention}/out/kernel", "in,in,out", "heads head hidden"),
        Row(f"{_MLP}.gate_proj.weight", f"{mlp}/wi_0/kernel", "in,out", "hidden inner"),
        Row(f"{_MLP}.up_proj.weight", f"{mlp}/wi_1/kernel", "in,out", "hidden inner"),
        Row(f"{_MLP}.down_proj.weight", f"{mlp}/wo/kernel", "in,out", "inner hidden"),
    )
    return tuple(replace(row, layers=layers) for row in rows)


_LOCAL_GLOBAL = 6  # gemma3 scans blocks of five local layers and a global one
_MAXTEXT = (
    Table("table: maxtext", _PLAIN, (*_maxtext("decoder/layers_#"), *_maxtext("decoder/layers")), by_base=True),
    Table(
        "table: maxtext gemma2",
        frozenset({"gemma2"}),
        tuple(
            row
            for layer in ("decoder/layers_#", "decoder/layers")
            for first, end in enumerate(("_local", "_global"))
            for row in _maxtext(layer, (2, first), end)
        ),
        by_base=True,
    ),
    Table(
        "table: maxtext gemma3",
        frozenset({"gemma3", "gemma3_text"}),
        (
            *_maxtext("decoder/layers_#"),
            *(
                row
                for first in range(_LOCAL_GLOBAL)
                for row in _maxtext(f"decoder/layers/layers_{first}", (_LOCAL_GLOBAL, first))
            ),
            *(replace(row, block=_LOCAL_GLOBAL) for row in _maxtext("decoder/layers_remainder/layers_#")),
        ),
        by_base=True,
    ),
)

TABLES = (_TUNIX, _TUNIX_GEMMA, _DEEPMIND, *_MAXTEXT)
