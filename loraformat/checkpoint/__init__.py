"""Checkpoints as bases: safetensors and PyTorch files, alone or in a folder, in one file or in many shards.

``folder`` finds the files and checks the index; ``shard`` is one file of weights, ``safetensors`` and ``torch`` its two
forms; ``tied`` knows which modules share a tensor; ``change`` is what becomes of one tensor; ``base`` puts them together.
"""

from loraformat.checkpoint.base import Checkpoint, kind

__all__ = ["Checkpoint", "kind"]
