"""GPT-2 with its cache in one tensor a layer, as transformers exported it (4.x): what ONNX Runtime's optimizer fuses with a past."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu
from transformers.pytorch_utils import Conv1D

LAYERS, HEADS, HIDDEN, WORDS, LONGEST = 2, 3, 24, 31, 16


class Attention(torch.nn.Module):
    """The scores of what is masked are replaced, or lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * HIDDEN, HIDDEN), Conv1D(HIDDEN, HIDDEN)
        causal = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
        self.register_buffer("causal", causal[None, None], persistent=False)

    def forward(self, x: torch.Tensor, past: torch.Tensor, lowered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (self._by_head(part) for part in self.c_attn(x).split(x.size(-1), dim=2))
        k, v = torch.cat((past[0], k), dim=-2), torch.cat((past[1], v), dim=-2)
        scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], v.size(-1) ** 0.5)
        new, all_ = q.size(-2), k.size(-2)
        scores = torch.where(self.causal[:, :, all_ - new : all_, :all_], scores, torch.full([], -10000.0))
        y = torch.matmul(torch.softmax(scores + lowered, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return self.c_proj(y.view((*y.size()[:-2], x.size(-1)))), torch.stack((k, v))

    @staticmethod
    def _by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view((*x.shape[:-1], HEADS, x.size(-1) // HEADS)).permute(0, 2, 1, 3)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = torch.nn.LayerNorm(HIDDEN), Attention(), torch.nn.LayerNorm(HIDDEN)
        self.c_fc, self.c_out = Conv1D(4 * HIDDEN, HIDDEN), Conv1D(HIDDEN, 4 * HIDDEN)

    def forward(self, x: torch.Tensor, past: torch.Tensor, lowered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, present = self.attn(self.ln_1(x), past, lowered)
        x = x + y
        return x + self.c_out(gelu(self.c_fc(self.ln_2(x)), approximate="tanh")), present


class CachedGpt2(torch.nn.Module):
    """(logits, what each layer has seen [2, rows, heads, tokens, size])."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(WORDS, HIDDEN), torch.nn.Embedding(LONGEST, HIDDEN)
        self.h = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.lm_head = torch.nn.LayerNorm(HIDDEN), torch.nn.Linear(HIDDEN, WORDS, bias=False)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x = self.wte(input_ids) + self.wpe(position_ids)
        seen = attention_mask.view(input_ids.size(0), -1)[:, None, None, :]
        presents = []
        for block, before in zip(self.h, past, strict=True):
            x, present = block(x, before, (1.0 - seen) * -10000.0)
            presents.append(present)
        return (self.lm_head(self.ln_f(x)), *presents)


def texts() -> dict[str, torch.Tensor]:
    """Three rows of three tokens behind four, of which one row has two and one none."""
    mask = torch.ones(3, 7)
    mask[1, :2], mask[2, :4] = 0, 0
    ids = {"input_ids": torch.randint(0, WORDS, (3, 3)), "position_ids": torch.arange(4, 7).expand(3, 3).contiguous()}
    past = {f"past_{n}": torch.randn(2, 3, HEADS, 4, HIDDEN // HEADS) for n in range(LAYERS)}
    return {**ids, "attention_mask": mask, **past}
