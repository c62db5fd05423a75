"""Two small models of torch's own modules, and what the first is fed: convolutions, and one weight in several places."""

from __future__ import annotations

import torch


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


def noise() -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(2, 3, 8, 6), "time": torch.randn(2, 5), "text": torch.randn(2, 4, 7)}
