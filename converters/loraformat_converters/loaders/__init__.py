"""What programs that run adapters accept, ignore and get wrong: one class each, by the source of the version named.

``findings`` asks the questions that they share; ``servers``, ``pictures`` and ``local`` hold the answers.
"""

from __future__ import annotations

from loraformat_converters.loaders.local import GenAI, LlamaCpp, Mlx, OnnxRuntime
from loraformat_converters.loaders.pictures import ComfyUI, Diffusers
from loraformat_converters.loaders.servers import Sglang, TensorRT, Vllm

__all__ = ["comfyui", "diffusers", "genai", "llama_cpp", "mlx", "ort", "sglang", "trtllm", "vllm"]

vllm, sglang, trtllm = Vllm(), Sglang(), TensorRT()
diffusers, comfyui = Diffusers(), ComfyUI()
mlx, llama_cpp, ort, genai = Mlx(), LlamaCpp(), OnnxRuntime(), GenAI()
