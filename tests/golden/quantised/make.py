"""Writes the quantised weights that tools write, and what the tools themselves say that they mean.

bitsandbytes 0.50.2 (on the processor), transformers 5.23.0, torch 2.13.0: ``python tests/golden/quantised/make.py``.
"""

from pathlib import Path

import bitsandbytes
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

HERE = Path(__file__).parent
OUT, IN, BLOCK = 150, 260, 128


def weight():
    torch.manual_seed(3)
    return torch.randn(OUT, IN) * torch.rand(OUT, 1)


def int8():
    linear = bitsandbytes.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    linear.weight = bitsandbytes.nn.Int8Params(weight().half(), has_fp16_weights=False, requires_grad=False)
    linear = linear.to("cpu")
    held = {f"q.{name}": tensor for name, tensor in linear.state_dict().items()}
    means = bitsandbytes.functional.int8_vectorwise_dequant(held["q.weight"], held["q.SCB"])
    save_file({**held, "means": means.float()}, HERE / "int8.safetensors")


def four_bits(name, out, in_, kind, dtype=torch.float32, nested=False):
    """Rows of an odd length, which share a byte; blocks that run over the end of a row, the last one cut off."""
    linear = bitsandbytes.nn.Linear4bit(in_, out, bias=False, quant_type=kind, compress_statistics=nested)
    values = torch.randn(out, in_, generator=torch.Generator().manual_seed(out)) * torch.rand(out, 1)
    linear.weight = bitsandbytes.nn.Params4bit(
        values.to(dtype), quant_type=kind, compress_statistics=nested, requires_grad=False
    )
    linear = linear.to("cpu")
    held = {f"q.{key}": tensor.contiguous() for key, tensor in linear.state_dict().items()}
    means = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    save_file({**held, "means": means.float().contiguous()}, HERE / f"{name}.safetensors")


def fp8():
    """Blocks of 128 × 128, the last ones cut off, as DeepSeek-V3 stores them."""
    whole = torch.nn.functional.pad(weight(), (0, -IN % BLOCK, 0, -OUT % BLOCK))
    blocks = whole.reshape(-(-OUT // BLOCK), BLOCK, -(-IN // BLOCK), BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).reshape(whole.shape).to(torch.float8_e4m3fn)
    padded = Fp8Dequantize(None)._dequantize_one(stored, scale, torch.float32)
    held = {"q.weight": stored[:OUT, :IN].contiguous(), "q.weight_scale_inv": scale}
    save_file({**held, "means": padded[:OUT, :IN].contiguous()}, HERE / "fp8.safetensors")


if __name__ == "__main__":
    int8()
    four_bits("nf4", 37, 90, "nf4")
    four_bits("fp4", 23, 45, "fp4")
    four_bits("nf4_nested", 130, 150, "nf4", torch.bfloat16, nested=True)
    fp8()
