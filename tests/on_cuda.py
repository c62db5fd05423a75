"""A plugin of pytest: every session of ONNX Runtime is on the GPU, and must give what the tests ask of the CPU.

In an environment with onnxruntime-gpu:

    PYTHONPATH=tests python -m pytest -p on_cuda -m "not peer and not slow" tests/test_onnx_*.py

Products of float32 are not in TF32 here. What CUDA does otherwise is left out, each with its reason (ONNX Runtime 1.31.1).
"""

from __future__ import annotations

import onnxruntime
import pytest

OTHERWISE = {
    "test_an_index_out_of_range_is_an_error": "CUDA's Gather checks no index: such a row is NaN",
    "test_an_index_that_is_no_adapters_is_an_error": "CUDA's Gather checks no index: such a row is NaN",
    "v of another size]": "CUDA's Attention is wrong where v has another size than q (0.69 off; its MultiHeadAttention is right)",
    "test_a_proof_takes_inputs_where_it_can_make_none": "CUDA's Gather checks no index: the base runs",
    "test_onnx_experts.py::test_every_expert": "CUDA's MoE wants sizes of at least 16",
    "test_onnx_experts.py::test_values_tell": "CUDA's MoE wants sizes of at least 16",
    "test_onnx_quantised_experts.py::test_scales_of_16_bits": "CUDA's QMoE wants an inner size that 64 divides",
    "[GatherBlockQuantized 4-dora]": "CUDA reads 4-bit zero points of an odd number of blocks across the ends of rows",
}

onnxruntime.preload_dlls()


class _OnCuda(onnxruntime.InferenceSession):
    def __init__(self, path_or_bytes, sess_options=None, providers=None, **more):
        cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
        super().__init__(path_or_bytes, sess_options, providers=[cuda, "CPUExecutionProvider"], **more)
        assert "CUDAExecutionProvider" in self.get_providers(), "it is not on the GPU"


onnxruntime.InferenceSession = _OnCuda


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in OTHERWISE.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
