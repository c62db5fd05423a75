"""PyTorch's own files (``torch.save``), read without running anything: tensors in plain containers, or a refusal.

A pickle is a program, and loading it runs what it says. Here nothing can be run: the few instructions that a
``state_dict`` needs are carried out by a machine of our own (``machine``), whose only functions note where a tensor
lies (``tensors``). Around the pickle lies a zip archive (``archive``) or, before torch 1.6, a bare stream (``stream``);
``file`` opens either and serves the tensors as views of the mapped file. A checkpoint of many processes
is a folder of such archives, a chunk of a tensor in each, and an index (``distributed``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["INDEX", "is_torch"]

INDEX = ".metadata"
"""The file of a distributed checkpoint that says where its tensors lie."""

_ZIP = b"PK\x03\x04"


def is_torch(path: Path) -> bool:
    """Whether the first bytes are those of ``torch.save``, or of any other pickle: that is then refused by name."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError:
        return False
    # The length of a safetensors header may begin with the same two bytes; the header itself begins with a brace.
    pickled = head[:1] == b"\x80" and head[1:2] <= b"\x05" and not (head[4:8] == bytes(4) and head[8:9] == b"{")
    return (head.startswith(_ZIP) and not _numpy(head)) or pickled


def _numpy(head: bytes) -> bool:
    """Whether a zip archive begins with an array of numpy: its first entry's name ends with ``.npy``."""
    length = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + length].endswith(b".npy")
