"""The transformers of Flux and Stable Diffusion 3: diffusers' split projections, and the fused ones as published.

diffusers 0.42.1 loaders/single_file_utils: convert_flux_transformer_checkpoint_to_diffusers,
convert_sd3_transformer_checkpoint_to_diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.naming.links import Share
from loraformat_converters.spaces.rows import Row, modules, swapped, thirds

__all__ = ["flux", "sd3"]

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_SINGLE = (("attn.to_q", 0, 1), ("attn.to_k", 1, 2), ("attn.to_v", 2, 3), ("proj_mlp", 3, 7))
"""linear1 holds q, k, v and an MLP of four times their size."""


def flux(double: int = 19, single: int = 38) -> Iterator[Row]:
    """Every parameter of FLUX.1, with the guidance that schnell lacks."""
    for name, old in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for n, layer in ((1, "in"), (2, "out")):
            yield from modules(f"time_text_embed.{name}_embedder.linear_{n}", f"{old}_in.{layer}_layer")
    yield from modules("context_embedder", "txt_in")
    yield from modules("x_embedder", "img_in")
    for i in range(double):
        yield from _double(f"transformer_blocks.{i}", f"double_blocks.{i}")
    for i in range(single):
        new, old = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield from modules(f"{new}.norm.linear", f"{old}.modulation.lin")
        for name, start, stop in _SINGLE:
            yield from modules(f"{new}.{name}", f"{old}.linear1", rows=Share(start, stop, 7))
        yield from modules(f"{new}.proj_out", f"{old}.linear2")
        for norm, of in (("norm_q", "query"), ("norm_k", "key")):
            yield Row(f"{new}.attn.{norm}.weight", f"{old}.norm.{of}_norm.scale")
    yield from modules("proj_out", "final_layer.linear")
    yield from swapped("norm_out.linear", "final_layer.adaLN_modulation.1")


def _double(new: str, old: str) -> Iterator[Row]:
    for stream, norm, names, out, ff, norms in (
        ("img", "norm1", _QKV, "to_out.0", "ff", ("norm_q", "norm_k")),
        ("txt", "norm1_context", _ADDED, "to_add_out", "ff_context", ("norm_added_q", "norm_added_k")),
    ):
        yield from modules(f"{new}.{norm}.linear", f"{old}.{stream}_mod.lin")
        q, k, v = (f"{new}.attn.{name}" for name in names)
        yield from thirds((q, k, v), f"{old}.{stream}_attn.qkv")
        yield from modules(f"{new}.attn.{out}", f"{old}.{stream}_attn.proj")
        yield from modules(f"{new}.{ff}.net.0.proj", f"{old}.{stream}_mlp.0")
        yield from modules(f"{new}.{ff}.net.2", f"{old}.{stream}_mlp.2")
        for name, of in zip(norms, ("query", "key"), strict=True):
            yield Row(f"{new}.attn.{name}.weight", f"{old}.{stream}_attn.norm.{of}_norm.scale")


def sd3(layers: int, dual: int = 0, *, normed: bool = False) -> Iterator[Row]:
    """Every parameter of SD 3 (24 layers) and 3.5 (large 38 layers; medium 24, of which 13 have a second attention).

    Args:
        dual: so many layers at the beginning have ``attn2``.
        normed: with norms of queries and keys, as 3.5 has.
    """
    yield from modules("pos_embed.proj", "x_embedder.proj")
    for name, old in (("timestep", "t"), ("text", "y")):
        for n, layer in ((1, 0), (2, 2)):
            yield from modules(f"time_text_embed.{name}_embedder.linear_{n}", f"{old}_embedder.mlp.{layer}")
    yield from modules("context_embedder")
    for i in range(layers):
        yield from _joint(f"transformer_blocks.{i}", f"joint_blocks.{i}", i == layers - 1, i < dual, normed)
    yield from modules("proj_out", "final_layer.linear")
    yield from swapped("norm_out.linear", "final_layer.adaLN_modulation.1")


def _joint(new: str, old: str, last: bool, dual: bool, normed: bool) -> Iterator[Row]:
    """One layer; the last one's context gives only keys and values, and its norm has scale and shift alone."""
    x, context = f"{old}.x_block", f"{old}.context_block"
    for attention in ("attn", "attn2") if dual else ("attn",):
        q, k, v = (f"{new}.{attention}.{name}" for name in _QKV)
        yield from thirds((q, k, v), f"{x}.{attention}.qkv")
        yield from modules(f"{new}.{attention}.to_out.0", f"{x}.{attention}.proj")
        if normed:
            for norm in ("q", "k"):
                yield Row(f"{new}.{attention}.norm_{norm}.weight", f"{x}.{attention}.ln_{norm}.weight")
    q, k, v = (f"{new}.attn.{name}" for name in _ADDED)
    yield from thirds((q, k, v), f"{context}.attn.qkv")
    if normed:
        for norm in ("q", "k"):
            yield Row(f"{new}.attn.norm_added_{norm}.weight", f"{context}.attn.ln_{norm}.weight")
    yield from modules(f"{new}.norm1.linear", f"{x}.adaLN_modulation.1")
    yield from _feed(f"{new}.ff", f"{x}.mlp")
    if last:
        yield from swapped(f"{new}.norm1_context.linear", f"{context}.adaLN_modulation.1")
        return
    yield from modules(f"{new}.norm1_context.linear", f"{context}.adaLN_modulation.1")
    yield from modules(f"{new}.attn.to_add_out", f"{context}.attn.proj")
    yield from _feed(f"{new}.ff_context", f"{context}.mlp")


def _feed(new: str, old: str) -> Iterator[Row]:
    yield from modules(f"{new}.net.0.proj", f"{old}.fc1")
    yield from modules(f"{new}.net.2", f"{old}.fc2")
