"""Three small models of torch's own modules: convolutions, one weight in several places, and modules of every kind in others."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D


class UNet(torch.nn.Module):
    """Down and up again with what was there beside it, a time, and attention to a text in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = torch.nn.GroupNorm(2, 8)
        self.down = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.time = torch.nn.Linear(5, 12)
        self.to_q = torch.nn.Linear(12, 10, bias=False)
        self.to_k = torch.nn.Linear(7, 10, bias=False)
        self.to_v = torch.nn.Linear(7, 10, bias=False)
        self.to_out = torch.nn.Linear(10, 12)
        self.up = torch.nn.Conv2d(12, 8, 3, padding=1)
        self.shortcut = torch.nn.Conv2d(16, 9, 1)
        self.conv_out = torch.nn.Conv2d(9, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.silu(self.norm1(self.conv_in(sample)))
        deep = self.down(wide) + self.time(time)[:, :, None, None]
        tokens = deep.flatten(2).transpose(1, 2)
        scores = self.to_q(tokens) @ self.to_k(text).transpose(1, 2) / 10**0.5
        tokens = tokens + self.to_out(scores.softmax(-1) @ self.to_v(text))
        deep = tokens.transpose(1, 2).reshape(deep.shape)
        up = self.up(torch.nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest"))
        return self.conv_out(torch.nn.functional.silu(self.shortcut(torch.cat([up, wide], 1))))


class Shared(torch.nn.Module):
    """One module called twice, and two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 6, bias=False)
        self.called_twice = torch.nn.Linear(6, 6)
        self.a = torch.nn.Linear(6, 6, bias=False)
        self.b = torch.nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.called_twice(self.first(x)).relu()
        return self.b(self.a(self.called_twice(once).relu()).relu())


class _Held(torch.nn.Module):
    """Two layers, which are called by what holds this."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(6, 9)
        self.k = torch.nn.Linear(9, 6)


class Kinds(torch.nn.Module):
    """Every kind of module that PEFT adapts, some in what is not called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.held = torch.nn.ModuleList([_Held(), _Held()])
        self.turned = Conv1D(10, 6)
        self.bare = torch.nn.Linear(10, 8, bias=False)
        self.conv = torch.nn.Conv2d(8, 5, 3, padding=1)
        self.ff = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x)
        for held in self.held:
            x = held.k(held.q(x).relu())
        x = self.bare(self.turned(x)).transpose(1, 2)[..., None]
        return self.ff(self.conv(x)[..., 0].transpose(1, 2))


def noise() -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(2, 3, 8, 6), "time": torch.randn(2, 5), "text": torch.randn(2, 4, 7)}
