"""Graphs that somebody damaged: what cannot be found, extracted or rounded in them is refused, never a traceback."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import test_onnx_branched as theirs
import test_onnx_experts as experts
import test_onnx_recurrent as recurrent
import test_onnx_requantised as codes
from graphs import model, save
from quantised_graphs import FORMS

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.verbs.graph import extract
from loraformat.verbs.merge import prepare

OPERATORS = ("MatMul", "Gemm", "LSTM", "MoE", "QMoE", "Unsqueeze", "Reshape", "Add", "Mul", "MatMulNBits", "QAttention")


def sound():
    """(graph, an adapter for it or None)."""
    yield from ((model(text), None) for text, _ in theirs.FORMS.values())
    yield from (
        (FORMS[form]()[0], codes.update_of(form)) for form in ("MatMulNBits 4", "GatherBlockQuantized 4", "QDQ")
    )
    for kind, directions in (("LSTM", 1), ("GRU", 2)):
        held = recurrent.parameters(kind, directions)
        yield recurrent.graph(kind, directions, held), recurrent.pairs(held, bound=True)[0]
    held = experts.weights()
    yield experts.graph(held), experts.pairs(held, bound=True)[0]


def damaged(made, draw):
    """One to three places of a graph are something else."""
    made = copy.deepcopy(made)
    names = [t.name for t in made.graph.initializer] + [o for n in made.graph.node for o in n.output] + ["", "x"]
    for _ in range(draw.integers(1, 4)):
        node, tensor = (held[draw.integers(len(held))] for held in (made.graph.node, made.graph.initializer))
        match draw.integers(7):
            case 0 if node.input:
                node.input[draw.integers(len(node.input))] = names[draw.integers(len(names))]
            case 1 if node.input:
                del node.input[draw.integers(len(node.input)) :]
            case 2 if node.attribute:
                attribute = node.attribute[draw.integers(len(node.attribute))]
                attribute.i = int(draw.choice([-1, 0, 1, 2, 3, 7, 2**40]))
                attribute.s = bytes(draw.choice([b"", b"zz", b"bidirectional"]))
            case 3 if tensor.dims:
                tensor.dims[draw.integers(len(tensor.dims))] = int(draw.choice([0, 1, 2, 5, 8, 10**6]))
            case 4:
                tensor.data_type = int(draw.integers(26))
            case 5:
                node.op_type, node.domain = str(draw.choice(OPERATORS)), str(draw.choice(["", "com.microsoft"]))
            case _:
                tensor.raw_data = tensor.raw_data[: draw.integers(len(tensor.raw_data) + 1)]
    return made


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_graph_is_refused_or_changed(seed, tmp_path):
    draw, pool, refused = np.random.default_rng(seed), list(sound()), 0
    for _ in range(30):
        made, adapter = pool[draw.integers(len(pool))]
        path = save(damaged(made, draw), tmp_path / "base.onnx")
        for verb in ("extract", "merge", "attach"):
            try:
                base = open_base(path)
                if verb == "extract":
                    extract(base)
                elif adapter is not None:
                    options = Options(tmp_path / "out.onnx", requantize=True, survival=0.0)
                    base.apply(prepare(verb, [("default", adapter)], base, options), force=True)
            except lf.LoraFormatError:
                refused += 1
    assert refused > 20
    assert onnx.load(path).graph.node
