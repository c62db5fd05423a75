"""Mixtures of experts in one operator: com.microsoft's MoE and QMoE (onnxruntime 1.32, docs/ContribOperators.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx

from loraformat_converters.onnx.graph.meanings import Meaning, attribute

__all__ = ["STACKS", "expert_bits", "experts", "quantised_experts"]

STACKS: Mapping[str, Mapping[int, str]] = {
    "MoE": {2: "fc1", 4: "fc2", 6: "fc3"},
    "QMoE": {2: "fc1", 5: "fc2", 8: "fc3"},
}
"""Operator → input → what the stack there is called."""


def experts(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """MoE: [experts, out, in] (onnxruntime 1.32, docs/ContribOperators.md)."""
    if len(shape) != 3:
        return f"{list(shape)} is no stack of matrices"
    if position != 2 or attribute(node, "swiglu_fusion", 0) != 1 or shape[1] % 2:
        return Meaning((1,), (2,), (0,))
    doubt = "rows of gate and up stand in turns there (swiglu_fusion = 1)"
    turned = tuple(row // 2 + row % 2 * (shape[1] // 2) for row in range(shape[1]))  # of [gate | up]
    return Meaning((1,), (2,), (0,), doubt=doubt, turned=turned)


def quantised_experts(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """QMoE: the bytes of such a stack, packed along in."""
    if position not in STACKS["QMoE"]:
        return f"{list(shape)} are its scales, zero points or biases"
    if (kind := attribute(node, "quant_type", b"int")) != b"int":
        return f"its codes are {kind!r}, whose steps are not equal"
    if attribute(node, "weights_prepacked", -1) == 1:
        return "its codes are laid out for one processor (weights_prepacked = 1): start from the model before that"
    bits = expert_bits(node, position)
    if len(shape) != 3 or bits not in (2, 4, 8):
        return f"{list(shape)} is no stack of matrices in 2, 4 or 8 bits"
    means = experts(node, position, shape)
    return means if isinstance(means, str) else replace(means, shape=(*shape[:2], shape[2] * (8 // bits)))


def expert_bits(node: onnx.NodeProto, position: int) -> int:
    """How many bits a code of one stack of QMoE has."""
    own = f"{STACKS['QMoE'][position]}_expert_weight_bits"
    return int(attribute(node, own, attribute(node, "expert_weight_bits", 4)))
