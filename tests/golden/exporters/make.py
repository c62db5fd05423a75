"""Golden graphs of exporters that know nothing of torch, with what their own framework computes once ΔW is added.

Run ``python make.py CASE`` in an environment that has the case's framework (they do not install together) and loraformat;
``golden.json`` says which versions wrote what is here. One folder a case:

``model.onnx``                what the exporter wrote, from a model that knew of no adapter
``weights.npz``               the framework's own arrays, by the names and in the axes that it has
``adapter.lora.safetensors``  random pairs for all matrices, placed in those axes, with sketches
``truth.safetensors``         the inputs, and the outputs of the framework: ``base`` without the adapter, ``adapted`` with ΔW
                              added to its arrays

One model in five spellings: a convolution over channels that come last, an embedding, a Dense over a sequence, an attention
whose kernels have heads, a Dense over rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import loraformat as lf
from loraformat.sketch import sketch

HERE = Path(__file__).resolve().parent
SIDE, CHANNELS, FILTERS, WORDS, WIDTH, HEADS, DEPTH, CLASSES = (5, 6), 9, 24, 37, 32, 4, 10, 11
POSITIONS = 12  # what a kernel of 3 × 3 leaves of 5 × 6
Array = np.ndarray[Any, Any]


def finish(
    case: str, model: Path, names: str, arrays: Mapping[str, Array], specs: Mapping[str, str],
    compute: Callable[[Mapping[str, Array]], Array], feeds: Mapping[str, Array], tools: tuple[str, ...],
) -> None:  # fmt: skip
    """Draw the pairs, let the framework compute, write the folder.

    Args:
        arrays: every array of the model, by name.
        specs: of those that the adapter changes: which axes are out and which in.
        compute: the framework's output with other arrays.
    """
    draw, targets, changed = np.random.default_rng(7), {}, dict(arrays)
    for number, (name, spec) in enumerate(specs.items()):
        kernel = arrays[name]
        place, rank = lf.Placement.of(kernel.shape, spec), 2 + number % 3
        out, in_ = place.matrix_shape
        a, b = (draw.standard_normal(shape).astype(np.float32) * 0.3 for shape in ((rank, in_), (out, rank)))
        alpha = 1.5 + number
        order = (*place.out, *place.in_)
        delta = (alpha / rank * (b.astype(np.float64) @ a)).reshape([kernel.shape[axis] for axis in order])
        changed[name] = (kernel + delta.transpose(np.argsort(order))).astype(np.float32)
        op = "embedding" if "embed" in name else None
        targets[name] = lf.Update((lf.Lora(a, b, alpha, "alpha/r"),), place, op=op, sketch=sketch(kernel, place))
    folder = HERE / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(model, folder / "model.onnx")
    np.savez(folder / "weights.npz", **arrays)
    lf.save(lf.Adapter(targets, names=names), folder / "adapter.lora.safetensors")
    from safetensors.numpy import save_file

    truth = {"base": compute(arrays), "adapted": compute(changed), **feeds}
    save_file({name: np.ascontiguousarray(array) for name, array in truth.items()}, folder / "truth.safetensors")
    versions = {tool: importlib.metadata.version(tool) for tool in tools}
    (folder / "golden.json").write_text(json.dumps({"case": case, "versions": versions}, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def inputs() -> dict[str, Array]:
    draw = np.random.default_rng(3)
    return {
        "image": draw.standard_normal((2, *SIDE, CHANNELS)).astype(np.float32),
        "ids": draw.integers(0, WORDS, (2, POSITIONS)).astype(np.int32),
    }


def drawn(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Normal values: a fresh bias is zero, and zeros hide mistakes."""
    draw = np.random.default_rng(5)
    return {name: (0.25 * draw.standard_normal(array.shape)).astype(np.float32) for name, array in arrays.items()}


KERNELS = {
    "conv/kernel": "in1,in2,in0,out",
    "embed/embedding": "in,out",
    "proj/kernel": "in,out",
    "attention/query/kernel": "in,out0,out1",
    "attention/key/kernel": "in,out0,out1",
    "attention/value/kernel": "in,out0,out1",
    "attention/out/kernel": "in0,in1,out",
    "head/kernel": "in,out",
}


def jax2onnx() -> None:
    """flax.nnx by jax2onnx."""
    import jax
    import onnx
    from flax import nnx
    from jax2onnx import to_onnx

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(CHANNELS, FILTERS, (3, 3), padding="VALID", rngs=rngs)
            self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
            self.proj = nnx.Linear(FILTERS, WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, HEADS * DEPTH, decode=False, rngs=rngs)
            self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

        def __call__(self, image: jax.Array, ids: jax.Array) -> jax.Array:
            x = jax.nn.relu(self.conv(image)).reshape(image.shape[0], POSITIONS, FILTERS)
            x = self.proj(x) + self.embed(ids)
            x = x + self.attention(x)
            return self.head(x.mean(1))

    module = Model(nnx.Rngs(0))

    def flat() -> dict[str, Any]:
        return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}

    def put(arrays: Mapping[str, Array]) -> None:
        for name, leaf in flat().items():
            leaf[...] = jax.numpy.asarray(arrays[name])

    feeds, arrays = inputs(), drawn({name: np.asarray(leaf[...]) for name, leaf in flat().items()})
    put(arrays)
    specs = [jax.ShapeDtypeStruct(feed.shape, feed.dtype) for feed in feeds.values()]
    made = to_onnx(module, specs, model_name="model")

    def compute(held: Mapping[str, Array]) -> Array:
        put(held)
        with jax.default_matmul_precision("highest"):
            return np.asarray(module(*feeds.values()))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(made, path)
        finish(
            "jax2onnx", path, "flax", arrays, KERNELS, compute, _named(path, feeds), ("jax2onnx", "jax", "flax", "onnx")
        )


def keras_by(backend: str) -> None:
    """keras on one of its backends, by its own ``export``."""
    os.environ["KERAS_BACKEND"] = backend
    import keras
    from keras import layers

    image = keras.Input((*SIDE, CHANNELS), name="image")
    ids = keras.Input((POSITIONS,), dtype="int32", name="ids")
    x = layers.Conv2D(FILTERS, 3, activation="relu", name="conv")(image)
    x = layers.Reshape((POSITIONS, FILTERS), name="flat")(x)
    x = layers.Dense(WIDTH, name="proj")(x)
    x = layers.Add(name="sum")([x, layers.Embedding(WORDS, WIDTH, name="embed")(ids)])
    x = layers.Add(name="residual")([x, layers.MultiHeadAttention(HEADS, DEPTH, name="attention")(x, x)])
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    model = keras.Model([image, ids], layers.Dense(CLASSES, name="head")(x))

    def put(arrays: Mapping[str, Array]) -> None:
        for weight in model.weights:
            weight.assign(arrays[weight.path])

    feeds = inputs()

    def compute(arrays: Mapping[str, Array]) -> Array:
        put(arrays)
        return np.asarray(keras.ops.convert_to_numpy(model([feeds["image"], feeds["ids"]])))

    arrays = drawn({weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights})
    compute(arrays)  # keras exports only what was called
    specs = {_of_keras(name): spec for name, spec in KERNELS.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.export(path, format="onnx", verbose=False)
        tools = {"torch": ("keras", "torch", "onnxscript"), "tensorflow": ("keras", "tensorflow-cpu", "tf2onnx")}[
            backend
        ]
        finish(f"keras-{backend}", path, "keras", arrays, specs, compute, _named(path, feeds), tools)


def _of_keras(name: str) -> str:
    return {"embed/embedding": "embed/embeddings", "attention/out/kernel": "attention/attention_output/kernel"}.get(
        name, name
    )


def _named(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds by what the graph calls its inputs, which come in the same order."""
    import onnx

    return dict(zip([v.name for v in onnx.load(path).graph.input], feeds.values(), strict=True))


def tf2onnx() -> None:
    """A function of TensorFlow's own operators, by tf2onnx."""
    import tensorflow as tf
    from tf2onnx import convert

    shapes = {
        "conv/kernel": (3, 3, CHANNELS, FILTERS), "embed/embedding": (WORDS, WIDTH), "proj/kernel": (FILTERS, WIDTH),
        "attention/query/kernel": (WIDTH, HEADS, DEPTH), "attention/key/kernel": (WIDTH, HEADS, DEPTH),
        "attention/value/kernel": (WIDTH, HEADS, DEPTH), "attention/out/kernel": (HEADS, DEPTH, WIDTH),
        "head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,),
    }  # fmt: skip
    arrays = drawn({name: np.empty(shape) for name, shape in shapes.items()})
    held = {name: tf.Variable(array, name=name) for name, array in arrays.items()}
    feeds = inputs()

    @tf.function(input_signature=[tf.TensorSpec(f.shape, f.dtype, name=n) for n, f in feeds.items()])
    def model(image: Any, ids: Any) -> Any:
        x = tf.nn.relu(tf.nn.conv2d(image, held["conv/kernel"], 1, "VALID"))
        x = tf.reshape(x, (2, POSITIONS, FILTERS))
        x = tf.tensordot(x, held["proj/kernel"], 1) + tf.gather(held["embed/embedding"], ids)
        q, k, v = (tf.einsum("btd,dnh->btnh", x, held[f"attention/{w}/kernel"]) for w in ("query", "key", "value"))
        scores = tf.nn.softmax(tf.einsum("btnh,bsnh->bnts", q, k) / DEPTH**0.5)
        mixed = tf.einsum("bnts,bsnh->btnh", scores, v)
        x = x + tf.einsum("btnh,nhd->btd", mixed, held["attention/out/kernel"])
        return tf.reduce_mean(x, 1) @ held["head/kernel"] + held["head/bias"]

    def compute(now: Mapping[str, Array]) -> Array:
        for name, variable in held.items():
            variable.assign(now[name])
        return np.asarray(model(feeds["image"], feeds["ids"]))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        convert.from_function(model, input_signature=model.input_signature, opset=17, output_path=str(path))
        finish(
            "tf2onnx", path, "org.tensorflow", arrays, KERNELS, compute, feeds, ("tf2onnx", "tensorflow-cpu", "onnx")
        )


def paddle2onnx() -> None:
    """paddle's own layers, channels first, by paddle2onnx."""
    import paddle
    from paddle import nn

    class Model(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2D(CHANNELS, FILTERS, 3)
            self.embed = nn.Embedding(WORDS, WIDTH)
            self.proj = nn.Linear(FILTERS, WIDTH)
            self.attention = nn.MultiHeadAttention(WIDTH, HEADS)
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, image: Any, ids: Any) -> Any:
            x = nn.functional.relu(self.conv(image))
            x = paddle.transpose(paddle.reshape(x, (2, FILTERS, POSITIONS)), (0, 2, 1))
            x = self.proj(x) + self.embed(ids)
            x = x + self.attention(x)
            return self.head(x.mean(1))

    model = Model()
    model.eval()
    made = inputs()
    feeds = {"image": made["image"].transpose(0, 3, 1, 2).copy(), "ids": made["ids"].astype(np.int64)}

    def put(arrays: Mapping[str, Array]) -> None:
        model.set_state_dict({name: paddle.to_tensor(array) for name, array in arrays.items()})

    def compute(arrays: Mapping[str, Array]) -> Array:
        put(arrays)
        with paddle.no_grad():
            return np.asarray(model(*(paddle.to_tensor(feed) for feed in feeds.values())).numpy())

    arrays = drawn({name: tensor.numpy() for name, tensor in model.state_dict().items()})
    put(arrays)
    attention = {f"attention.{name}_proj.weight": "in,out" for name in ("q", "k", "v", "out")}
    specs = {
        "conv.weight": "out,in,in,in", "embed.weight": "in,out", "proj.weight": "in,out",
        **attention, "head.weight": "in,out",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        signature = [paddle.static.InputSpec(f.shape, str(f.dtype), name=n) for n, f in feeds.items()]
        paddle.onnx.export(model, f"{folder}/model", input_spec=signature, opset_version=17)
        tools = ("paddle2onnx", "paddlepaddle", "onnx")
        finish("paddle2onnx", Path(folder) / "model.onnx", "org.paddlepaddle", arrays, specs, compute, feeds, tools)


CASES = {
    "jax2onnx": jax2onnx,
    "keras-torch": lambda: keras_by("torch"),
    "keras-tensorflow": lambda: keras_by("tensorflow"),
    "tf2onnx": tf2onnx,
    "paddle2onnx": paddle2onnx,
}

if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        CASES[case]()
