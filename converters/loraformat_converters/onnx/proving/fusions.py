"""What ONNX Runtime fused in the base and cannot fuse any more in the attached model: counted in the graphs that it runs."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx

from loraformat_converters.onnx.graph.operators import operator

__all__ = ["unfused"]


def unfused(base: Path, attached: Path) -> Mapping[str, tuple[int, int]]:
    """Operator → how many the runtime makes of the base, and how many of the attached model, where these are fewer.

    Operators that a model has itself are not counted. Nothing where one cannot be looked at.
    """
    before, after = _fused(base), _fused(attached)
    if before is None or after is None:
        return {}
    return {name: (n, after[name]) for name, n in sorted(before.items()) if after[name] < n}


def _fused(path: Path) -> Counter[str] | None:
    """The operators that the optimised graph has more than the graph, on the CPU; None of a model that does not run there."""
    import onnxruntime

    model = onnx.load(str(path), load_external_data=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    # What is written refers to external data where that lies (1.32), and is not run: a large model is neither copied nor packed.
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception:  # of bfloat16, which has no kernels there, or of operators of another provider
            return None
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(map(operator, _nodes(optimised.graph))) - Counter(map(operator, _nodes(model.graph)))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, in inner graphs too: those that the runtime writes may reuse names, which ``scopes`` refuses."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _nodes(inner)
