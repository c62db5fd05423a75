"""Writes weights that gptqmodel packed, in the first form of the file, and what it says that they mean, [in, out].

gptqmodel 7.7.0 (its sources, whose package asks for another torch), torch 2.13.0: ``python make_gptq.py`` in this folder.
"""

from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

HERE = Path(__file__).parent


def packed(name, out, in_, bits, group, act_order=False):
    """Zeros differ by group and output; none is 0, which the first form of the file cannot hold."""
    draw = torch.Generator().manual_seed(out + bits)
    linear = torch.nn.Linear(in_, out, bias=False)
    linear.weight.data = torch.randn(out, in_, generator=draw) * torch.rand(out, 1, generator=draw)
    index = torch.arange(in_, dtype=torch.int32) // group
    if act_order:
        index = index[torch.randperm(in_, generator=draw)]
    levels = 2**bits - 1
    scales = torch.rand(out, in_ // group, generator=draw) * 4 / levels + 0.05
    zeros = torch.randint(1, levels, (out, in_ // group), generator=draw).float()
    layer = TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=act_order, in_features=in_, out_features=out, bias=False
    )
    layer.pack_original(linear, scales, zeros, index)
    layer.post_init()
    means = layer.dequantize_weight().float().contiguous()
    convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group))
    held = {f"q.{key}": getattr(layer, key).contiguous() for key in ("qweight", "qzeros", "scales", "g_idx")}
    save_file({**held, "means": means}, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    packed("gptq_4", 64, 96, 4, 32)
    packed("gptq_8", 32, 64, 8, 64)
    packed("gptq_2_act_order", 32, 96, 2, 16, act_order=True)
