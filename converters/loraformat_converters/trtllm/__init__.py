"""TensorRT-LLM (its ``hf_lora_convert.py``): ``model.lora_weights.npy`` and ``model.lora_config.npy`` in a folder.

- ``lora_weights`` [1, modules, longest]: a row a module, A [r, in] and then B [out, r], row-major, the scale multiplied
  into B, zeros behind. Of experts one row has them all: A [experts, r, in], B [experts, out, r].
- ``lora_config`` int32 [1, modules, 3]: the number of the module, that of the layer, r. A fourth column, of newer
  versions, says whether a magnitude follows that was already divided by the norms of one base: no weight says that.

No name, no size of a side and no scale is in the files: modules are numbers (``LORA_MODULE_IDS`` of lora_manager.py,
which only ever grew), so that the names here, ``layers.0.attn_q``, are a name space of their own; where in a row A ends
only the sizes of the model tell, which ``--base`` or its ``config.json`` gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["CONFIG", "MODULES", "NAMES", "STACKED", "WEIGHTS", "Trtllm", "layout"]

NAMES = "com.nvidia.tensorrt-llm"
"""The name space: ``layers.<number>.<module>``."""

WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"

# NVIDIA/TensorRT-LLM lora_manager.py, LoraManager.LORA_MODULE_IDS, in the order of the numbers.
MODULES = (
    "attn_qkv", "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate",
    "cross_attn_qkv", "cross_attn_q", "cross_attn_k", "cross_attn_v", "cross_attn_dense",
    "moe_h_to_4h", "moe_4h_to_h", "moe_gate", "moe_router", "mlp_router", "mlp_gate_up",
    "shared_expert_h_to_4h", "shared_expert_4h_to_h", "shared_expert_gate",
    "mamba_in_proj", "mamba_out_proj", "moe_latent_fc1", "moe_latent_fc2",
)  # fmt: skip

STACKED = frozenset({"moe_h_to_4h", "moe_4h_to_h", "moe_gate"})
"""The modules of which one row has the factors of all experts: every A, and then every B."""


class Trtllm:
    """TensorRT-LLM's two arrays."""

    name = "trtllm"
    carries = frozenset({"lora"})
    writes = True
    describes = "TensorRT-LLM: model.lora_weights.npy, model.lora_config.npy"
    scale = "nowhere: it is multiplied into B"
    markers = frozenset({WEIGHTS})
    endings: tuple[str, ...] = ()
    names = frozenset({NAMES})

    def detect(self, source: Source) -> str | None:
        """Both files, side by side."""
        named = source.path.name in (WEIGHTS, CONFIG) or source.path.is_dir()
        if named and all((source.folder / name).is_file() for name in (WEIGHTS, CONFIG)):
            return f"{WEIGHTS} and {CONFIG}"
        return None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.trtllm.read``."""
        from loraformat_converters.trtllm.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.trtllm.write``."""
        from loraformat_converters.trtllm.write import write

        return write(adapter)


layout = Trtllm()
