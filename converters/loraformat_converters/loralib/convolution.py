"""Conv2d: B·A viewed as the kernel, as one pair [out, in·k·k] and back.

loralib 0.1.2 ConvLoRA: ΔW = (lora_B @ lora_A).view(weight.shape), A [r·k, in·k], B [out·k/groups, r·k]. Only the numbers
of a Conv2d come out even: for Conv1d and Conv3d the view itself fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["flattened", "viewed"]


def flattened(a: Array, b: Array, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
    """(A, B) of ΔW as a matrix [out, in·k·k], exactly; None where the view does not come out even.

    A row of the kernel is some rows of B·A side by side; or, of a convolution of more than k groups, a part of one.
    """
    out, length = shape[0], int(np.prod(shape[1:]))
    if b.shape[0] * a.shape[1] != out * length:
        return None
    if b.shape[0] % out == 0:
        n = b.shape[0] // out
        wide = np.zeros((n, a.shape[0], n, a.shape[1]), a.dtype)
        for i in range(n):
            wide[i, :, i] = a
        return wide.reshape(n * a.shape[0], length), b.reshape(out, n * b.shape[1])
    if out % b.shape[0] == 0:
        n = out // b.shape[0]
        pieces = a.reshape(a.shape[0], n, length).transpose(1, 0, 2).reshape(n * a.shape[0], length)
        tall = np.zeros((b.shape[0], n, n, b.shape[1]), b.dtype)
        for i in range(n):
            tall[:, i, i] = b
        return pieces, tall.reshape(out, n * b.shape[1])
    return None


def viewed(a: Array, b: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """loralib's (A, B) of a pair [r, in·k·k] · [out, r] of an ungrouped kernel [out, in, k, k], exactly: r·k rows.

    Where the pair is what ``flattened`` made, the smaller one that it made it of.
    """
    out, k = shape[0], shape[2]
    columns = a.shape[1] // k
    if a.shape[0] % k == 0:
        small_a, small_b = a[: a.shape[0] // k, :columns], b.reshape(out * k, -1)
        again = flattened(small_a, small_b, shape)
        if again is not None and again[0].tobytes() == np.ascontiguousarray(a).tobytes():
            return small_a, small_b
    rows = a.reshape(a.shape[0] * k, columns)
    spread = np.zeros((out, k, b.shape[1], k), b.dtype)
    for i in range(k):
        spread[:, i, :, i] = b
    return rows, spread.reshape(out * k, b.shape[1] * k)
