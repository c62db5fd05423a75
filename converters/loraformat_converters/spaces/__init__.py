"""Name spaces: kohya's underscores, image models as their authors published them, the names of older transformers.

``families`` knows the image models, ``unet``, ``mmdit`` and ``encoders`` the names of their parameters, in diffusers and
as published; ``kohya`` and ``published`` are the two spaces made of them. ``renames`` is transformers' own, with
``conversions`` for what it divides, joins and stacks; ``timm`` has the vision transformers that both know.
"""

from __future__ import annotations

from loraformat_converters.spaces.kohya import Kohya
from loraformat_converters.spaces.published import Published
from loraformat_converters.spaces.renames import Renames
from loraformat_converters.spaces.timm import Timm

__all__ = ["kohya", "published", "renames", "timm"]

kohya = Kohya()
published = Published()
renames = Renames()
timm = Timm()
