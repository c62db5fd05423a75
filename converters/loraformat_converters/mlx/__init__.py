"""MLX adapters (mlx-lm 0.32.2): a folder with adapter_config.json and adapters.safetensors.

Differs from PEFT in more than names. Both factors lie the other way round, ``lora_a`` [in, r] and ``lora_b`` [r, out],
but those of stacked experts do not ([E, r, in], [E, out, r]). One number, ``scale``, multiplies every pair, and one rank
is that of all. The loader chooses modules by the configuration, and takes no tensor that it did not expect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat_converters.mlx import config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.naming.links import Link
    from loraformat.naming.spaces import Known
    from loraformat.source import Source

__all__ = ["Mlx", "MlxSpace", "layout", "space"]

TENSORS = "adapters.safetensors"


class Mlx:
    """mlx-lm's folder: adapter_config.json, adapters.safetensors."""

    name = "mlx"
    carries = frozenset({"replace", "lora", "magnitude"})
    writes = True
    describes = "MLX (mlx-lm): adapter_config.json, adapters.safetensors"
    scale = "lora_parameters.scale in adapter_config.json: the scale itself, one for all"
    markers = frozenset({TENSORS})
    endings: tuple[str, ...] = ()
    names = frozenset({"mlx"})

    def detect(self, source: Source) -> str | None:
        """The keys of mlx-lm's configuration; or, in a bare file of its name, of its tensors."""
        if source.torch or (source.file is not None and source.file.suffix != ".safetensors"):
            return None
        if key := config.mark(source):
            return f"{config.FILE} has {key}"
        named = source.file is not None and source.file.name.endswith(TENSORS)
        if named and any(name.endswith(".lora_a") for name in source.tensors):
            return f"the file is called {TENSORS} and keys end with .lora_a"
        return None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.mlx.read``."""
        from loraformat_converters.mlx.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.mlx.write``."""
        from loraformat_converters.mlx.write import write

        return write(adapter)


class MlxSpace:
    """The names of the parameters in a model of mlx-lm."""

    name = "mlx"
    describes = "the parameters of a model in mlx-lm"

    def links(self, known: Known) -> Iterable[Link]:
        """See ``loraformat_converters.mlx.names``."""
        from loraformat_converters.mlx.names import links

        return links(known)


layout = Mlx()
space = MlxSpace()
