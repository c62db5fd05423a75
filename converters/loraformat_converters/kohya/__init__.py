"""kohya's and LyCORIS' adapters, as A1111 and ComfyUI load them: one safetensors file of ``<module>.<role>`` tensors.

One layout, and not two: a kohya file *is* a LyCORIS file whose only algorithm is LoCon. Both programs give the modules
the same mangled names, state the scale by the same ``alpha`` tensors, write the same header, and mix in one file what
was trained together; no file could be said to be of one and not of the other, and every reader of either takes both.

``names`` is the grammar of the tensors' names, ``scales`` what an alpha tensor means, ``header`` the metadata;
``factors`` builds the additive parts, ``magnitudes`` DoRA's, ``split`` finds fused query-key-value pairs; ``read`` puts
them together, ``write`` and ``form`` lead back. Names stay mangled: only the model's own list of modules undoes it.

Read off sd-scripts 48d368f (networks/lora.py, lora_flux.py, resize_lora.py; library/train_util.py, sai_model_spec.py),
lycoris-lora 4.1.3 (modules/, wrapper.py) and ComfyUI (lora.py, weight_adapter/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat import file
from loraformat_converters.kohya import names

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["Kohya", "layout"]

_PEFT_CONFIG = "adapter_config.json"


class Kohya:
    """One file: ``<module>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``, and LyCORIS' other algorithms."""

    name = "kohya"
    carries = frozenset({"lora", "loha", "lokr", "delta", "magnitude"})
    writes = True
    describes = "kohya sd-scripts, LyCORIS, A1111, ComfyUI: one .safetensors file"
    scale = "alpha / rows of lora_down, a tensor beside each module"
    markers: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()
    names = frozenset({"kohya"})

    def detect(self, source: Source) -> str | None:
        """A tensor's name that only this layout spells so; none in a native file or beside a configuration of PEFT."""
        if source.file is None or not (source.torch or source.file.suffix == ".safetensors"):
            return None
        if file.KEY in source.header:  # whose roles have LyCORIS' names
            return None
        found = next((name for name in source.tensors if names.is_own(name)), None)
        if found is None or source.sidecar(_PEFT_CONFIG) is not None:
            return None
        return f"a tensor is called {found}"

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.kohya.read``."""
        from loraformat_converters.kohya.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.kohya.write``."""
        from loraformat_converters.kohya.write import write

        return write(adapter)


layout = Kohya()
