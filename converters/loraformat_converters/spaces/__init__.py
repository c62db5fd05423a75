"""Name spaces of image models: kohya's underscores, and the names under which their authors published them.

``families`` knows the models, ``unet``, ``mmdit`` and ``encoders`` the names of their parameters, in diffusers and as
published; ``kohya`` and ``published`` are the two spaces made of them.
"""

from __future__ import annotations

from loraformat_converters.spaces.kohya import Kohya
from loraformat_converters.spaces.published import Published

__all__ = ["kohya", "published"]

kohya = Kohya()
published = Published()
