"""Small ONNX models from text, adapters for them, and what ONNX Runtime makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser

from loraformat import Adapter, Lora, Update

SIZES = {"N": 3, "T": 4}
"""What the symbolic sizes of inputs are when a model runs."""


def model(text, *, opset=18, ir=10, seed=7):
    """The model of a textual graph; every value that it declares and nothing computes becomes a random initializer."""
    made = parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}, "com.microsoft": 1]>\n{text}')
    draw = np.random.default_rng(seed)
    computed = {name for node in made.graph.node for name in node.output}
    declared = [value for value in made.graph.value_info if value.name not in computed]
    del made.graph.value_info[:]
    for value in declared:
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        values = draw.standard_normal(shape) * (9 if np.issubdtype(dtype, np.integer) else 1)
        made.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), value.name))
    return made


def save(made, path):
    """``path``, with the model in it."""
    path.write_bytes(made.SerializeToString())
    return path


def stored(path):
    """Name → values of every initializer of the main graph, external ones too."""
    made = onnx.load(path)
    return {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}


def lora(out, in_, rank=2, *, alpha=3.0, rule="alpha/r", seed=1, dtype=np.float32):
    """An update with normal factors."""
    draw = np.random.default_rng(seed)
    a, b = draw.standard_normal((rank, in_)), draw.standard_normal((out, rank))
    return Update((Lora(a.astype(dtype), b.astype(dtype), alpha, rule),))


def adapter(targets):
    """Key → (out, in) or Update, as an adapter."""
    made = {k: u if isinstance(u, Update) else lora(*u, seed=i + 1) for i, (k, u) in enumerate(targets.items())}
    return Adapter(made)


def session(path, *, optimise=True, optimised=None):
    """A session on one thread; ``optimised``: where to leave the graph that it runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised:
        # Past EXTENDED the graph would hold blocked layouts of this one processor.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(running, seed=3):
    """Normal values for every input of a session, small ones for integers, True."""
    draw = np.random.default_rng(seed)
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    made = {}
    for value in running.get_inputs():
        shape = [SIZES.get(size, size) for size in value.shape]
        if value.type in kinds:
            made[value.name] = draw.standard_normal(shape).astype(kinds[value.type])
        else:
            made[value.name] = draw.integers(0, 5, shape) if value.type == "tensor(int64)" else np.array(True)
    return made


def run(path, *, optimise=True, seed=3):
    """Output name → values, for the same random inputs every time."""
    return outputs(session(path, optimise=optimise), seed)


def outputs(running, seed=3):
    """Output name → values, of a session."""
    names = [o.name for o in running.get_outputs()]
    return dict(zip(names, running.run(names, feeds(running, seed)), strict=True))


def inputs(path, seed=3):
    """Input name → the float64 values that ``run`` feeds."""
    return {name: np.asarray(v, np.float64) for name, v in feeds(session(path), seed).items()}
