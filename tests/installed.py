"""What ONNX Runtime can since which release: a test that needs more than the oldest release we support says so here.

The releases are those with which these tests turned green. Where the newest is installed nothing is skipped by them, and
with LORAFORMAT_CI a skipped test is a failure.
"""

from __future__ import annotations

import onnxruntime
import pytest

RELEASE = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])

SINCE = {
    "data of a model in memory": (1, 21),
    "opset 23": (1, 23),
    "MatMulNBits 8": (1, 23),
    "GatherBlockQuantized": (1, 23),
    "MatMulNBits 2": (1, 24),
    "MoE": (1, 24),
    "QMoE": (1, 28),
}


def needs(what):
    """Skip the test where ONNX Runtime is older; ``what`` may be a form of a graph, told by how its name begins."""
    for known, release in SINCE.items():
        if what.startswith(known) and release > RELEASE:
            pytest.skip(f"onnxruntime before {release[0]}.{release[1]} does not run this: {known}")
