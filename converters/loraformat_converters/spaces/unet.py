"""The U-Net of Stable Diffusion 1, 2 and XL: diffusers' blocks, and input_blocks, middle_block, output_blocks.

diffusers 0.42.1 loaders/single_file_utils.convert_ldm_unet_checkpoint reads the one as the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraformat_converters.spaces.rows import WEIGHT, Row, modules

__all__ = ["unet"]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}  # fmt: skip


def unet(channels: Sequence[int], depths: Sequence[int], middle: int, *, added: bool = False) -> Iterator[Row]:
    """Every parameter.

    Args:
        channels: of each level; a resnet that changes them has a shortcut.
        depths: transformer blocks in each attention of each level; 0: no attention.
        middle: transformer blocks in the middle.
        added: with XL's embedding of sizes and pooled text.
    """
    last = len(channels) - 1
    yield from modules("conv_in", "input_blocks.0.0")
    for n, old in ((1, 0), (2, 2)):
        yield from modules(f"time_embedding.linear_{n}", f"time_embed.{old}")
        if added:
            yield from modules(f"add_embedding.linear_{n}", f"label_emb.0.{old}")
    for i, depth in enumerate(depths):
        for j in range(2):
            grows = j == 0 and i > 0 and channels[i] != channels[i - 1]
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{3 * i + j + 1}.0", grows)
            yield from _attention(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{3 * i + j + 1}.1", depth)
        if i < last:
            yield from modules(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op")
    yield from _resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from _attention("mid_block.attentions.0", "middle_block.1", middle)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", False)
    for i, depth in enumerate(reversed(depths)):
        for j in range(3):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{3 * i + j}.0", True)
            yield from _attention(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{3 * i + j}.1", depth)
        if i < last:  # behind the attention, where there is one
            yield from modules(
                f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{3 * i + 2}.{2 if depth else 1}.conv"
            )
    yield from modules("conv_norm_out", "out.0")
    yield from modules("conv_out", "out.2")


def _resnet(torch: str, published: str, shortcut: bool) -> Iterator[Row]:
    for name, old in _RESNET.items():
        yield from modules(f"{torch}.{name}", f"{published}.{old}")
    if shortcut:
        yield from modules(f"{torch}.conv_shortcut", f"{published}.skip_connection")


def _attention(torch: str, published: str, depth: int) -> Iterator[Row]:
    """Both names agree inside of it."""
    if not depth:
        return
    for name in ("norm", "proj_in", "proj_out"):
        yield from modules(f"{torch}.{name}", f"{published}.{name}")
    for k in range(depth):
        new, old = (f"{prefix}.transformer_blocks.{k}" for prefix in (torch, published))
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v"):
                yield from modules(f"{new}.{attention}.{name}", f"{old}.{attention}.{name}", WEIGHT)
            yield from modules(f"{new}.{attention}.to_out.0", f"{old}.{attention}.to_out.0")
        for name in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"):
            yield from modules(f"{new}.{name}", f"{old}.{name}")
