"""Valid vectors of lora and delta: every placement, every scale rule, every float dtype."""

from __future__ import annotations

import math

import numpy as np
from vector import Array, Vector, dense, einsum, lora, place, valid


@valid("LF-101", "LF-102", "LF-201", "LF-207", "LF-304", "LF-311")
def smallest(v: Vector) -> None:
    """The file of section 1: one unplaced Linear of rank 1."""
    A, B = np.array([[0.5, -1.25, 2]], np.float32), np.array([[1], [-0.75]], np.float32)
    v.target("proj.weight", lora(A, B, 2))
    v.expect("proj.weight", matrix=2 * einsum("or,ri->oi", B, A))


@valid("LF-401")
def linear_unplaced(v: Vector) -> None:
    """A Linear of which the source does not say how it lies: the matrix is known, the delta is not."""
    A, B = v.numbers(3, 7), v.numbers(5, 3)
    v.target("layer.weight", lora(A, B, 6), assumed=["name"])
    v.expect("layer.weight", matrix=2 * einsum("or,ri->oi", B, A))


@valid()
def linear(v: Vector) -> None:
    """A Linear [out, in]."""
    v.top["names"] = "mlx"
    A, B = v.numbers(3, 7), v.numbers(5, 3)
    v.target("layer.weight", lora(A, B, 6), **place([5, 7], out=[0], in_=[1]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    v.adds("layer.weight", matrix, matrix)


@valid()
def linear_square(v: Vector) -> None:
    """A square weight that lies transposed: no shape tells, only the axes do."""
    A, B = v.numbers(3, 6), v.numbers(6, 3)
    v.target("layer.kernel", lora(A, B, 6), **place([6, 6], out=[1], in_=[0]))
    v.adds("layer.kernel", 2 * einsum("or,ri->oi", B, A), 2 * einsum("or,ri->io", B, A))


@valid()
def conv1d(v: Vector) -> None:
    """A Conv1D of Hugging Face [in, out]."""
    A, B = v.numbers(3, 7), v.numbers(5, 3)
    v.target("h.0.attn.c_attn.weight", lora(A, B, 6), **place([7, 5], out=[1], in_=[0]))
    v.adds("h.0.attn.c_attn.weight", 2 * einsum("or,ri->oi", B, A), 2 * einsum("or,ri->io", B, A))


def _conv(v: Vector) -> tuple[Array, Array, Array]:
    """One pair for both convolutions: A [r, in·kh·kw], the same A as [r, in, kh, kw], B [out, r]."""
    v.seed = "conv"
    A, B = v.numbers(4, 2 * 3 * 5), v.numbers(7, 4)
    return A, A.reshape(4, 2, 3, 5), B


@valid()
def conv_torch(v: Vector) -> None:
    """A convolution of PyTorch [out, in, kh, kw]."""
    A, kernels, B = _conv(v)
    v.target("conv.weight", lora(A, B, 2), **place([7, 2, 3, 5], out=[0], in_=[1, 2, 3]))
    v.adds("conv.weight", 0.5 * einsum("or,ri->oi", B, A), 0.5 * einsum("or,riyx->oiyx", B, kernels))


@valid()
def conv_jax(v: Vector) -> None:
    """A convolution kernel of JAX [kh, kw, in, out], with the factors of conv_torch byte for byte."""
    A, kernels, B = _conv(v)
    v.top["names"] = "flax"
    v.target("conv/kernel", lora(A, B, 2), **place([3, 5, 2, 7], out=[3], in_=[2, 0, 1]))
    v.adds("conv/kernel", 0.5 * einsum("or,ri->oi", B, A), 0.5 * einsum("or,riyx->yxio", B, kernels))


@valid("LF-402")
def conv_1x1(v: Vector) -> None:
    """Axes of size 1 are axes: a convolution over single points."""
    A, B = v.numbers(3, 2), v.numbers(7, 3)
    v.target("conv.weight", lora(A, B, 6), **place([7, 2, 1, 1], out=[0], in_=[1, 2, 3]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    v.adds("conv.weight", matrix, matrix.reshape(7, 2, 1, 1))


@valid()
def embedding(v: Vector) -> None:
    """An embedding [vocabulary, dim]: A is [r, vocabulary], the input is a one-hot row."""
    A, B = v.numbers(3, 11), v.numbers(6, 3)
    v.target("embed_tokens.weight", lora(A, B, 6), **place([11, 6], out=[1], in_=[0]), op="embedding")
    v.adds("embed_tokens.weight", 2 * einsum("or,ri->oi", B, A), 2 * einsum("or,ri->io", B, A))


@valid()
def experts(v: Vector) -> None:
    """Experts in one tensor [expert, out, in]: a pair for each."""
    A, B = v.numbers(3, 2, 7), v.numbers(3, 5, 2)
    v.target("experts.up_proj", lora(A, B, 6), **place([3, 5, 7], out=[1], in_=[2], batch=[0]))
    delta = 3 * einsum("eor,eri->eoi", B, A)
    v.adds("experts.up_proj", delta, delta)


@valid()
def scanned_layers(v: Vector) -> None:
    """Layers scanned along a middle axis [in, layer, out]."""
    v.top["names"] = "flax"
    A, B = v.numbers(3, 2, 7), v.numbers(3, 5, 2)
    v.target("layers/mlp/kernel", lora(A, B, 6), **place([7, 3, 5], out=[2], in_=[0], batch=[1]))
    v.adds("layers/mlp/kernel", 3 * einsum("lor,lri->loi", B, A), 3 * einsum("lor,lri->ilo", B, A))


@valid("LF-402")
def two_batch_axes(v: Vector) -> None:
    """Two batch axes whose order is not that of the tensor [expert, in, layer, out]."""
    A, B = v.numbers(4, 3, 2, 7), v.numbers(4, 3, 5, 2)
    v.target("w", lora(A, B, 6), **place([3, 7, 4, 5], out=[3], in_=[1], batch=[2, 0]))
    v.adds("w", 3 * einsum("leor,leri->leoi", B, A), 3 * einsum("leor,leri->eilo", B, A))


@valid("LF-309", "LF-403")
def shared_factors(v: Vector) -> None:
    """A batch size of 1 is shared by all: A shared, B shared, both shared, and one delta for every expert."""
    axes = place([3, 5, 7], out=[1], in_=[2], batch=[0])
    A, B = v.numbers(1, 2, 7), v.numbers(3, 5, 2)
    v.target("a_shared", lora(A, B, 6), **axes)
    delta = 3 * einsum("eor,ri->eoi", B, A[0])
    v.adds("a_shared", delta, delta)
    A, B = v.numbers(3, 2, 7), v.numbers(1, 5, 2)
    v.target("b_shared", lora(A, B, 6), **axes)
    delta = 3 * einsum("or,eri->eoi", B[0], A)
    v.adds("b_shared", delta, delta)
    A, B, D = v.numbers(1, 2, 7), v.numbers(1, 5, 2), v.numbers(1, 5, 7)
    for key, part, matrix in (
        ("both_shared", lora(A, B, 6), 3 * einsum("bor,bri->boi", B, A)),
        ("delta_shared", dense(D, 0.5), 0.5 * D.astype(np.float64)),
    ):
        v.target(key, part, **axes)
        v.adds(key, matrix, np.repeat(matrix, 3, axis=0))


@valid("LF-403")
def einsum_heads(v: Vector) -> None:
    """An einsum kernel [heads, dim, head_dim] of Keras: a batch of heads, B shared, still of rank r."""
    v.top["names"] = "keras"
    A, B = v.numbers(3, 2, 7), v.numbers(1, 5, 2)
    v.target("attention/query/kernel", lora(A, B, 6), **place([3, 7, 5], out=[2], in_=[1], batch=[0]))
    v.adds("attention/query/kernel", 3 * einsum("or,nri->noi", B[0], A), 3 * einsum("or,nri->nio", B[0], A))


@valid("LF-402")
def grouped_axes(v: Vector) -> None:
    """Several axes on both sides, in an order of their own: [in_a, out_b, in_b, out_a]."""
    A, B = v.numbers(2, 3 * 4), v.numbers(5 * 7, 2)
    v.target("w", lora(A, B, 6), **place([3, 7, 4, 5], out=[3, 1], in_=[0, 2]))
    delta = 3 * einsum("pqr,rst->sqtp", B.reshape(5, 7, 2), A.reshape(2, 3, 4))
    v.adds("w", 3 * einsum("or,ri->oi", B, A), delta)


@valid()
def lora_bias(v: Vector) -> None:
    """The bias that a trained lora_B brings: a dense delta on a vector, its scale stated as a factor or by a rule."""
    A, B, bias = v.numbers(4, 7), v.numbers(5, 4), v.numbers(5)
    v.target("layer.weight", lora(A, B, 6, "alpha/sqrt(r)"), **place([5, 7], out=[0], in_=[1]))
    matrix = 3 * einsum("or,ri->oi", B, A)
    v.adds("layer.weight", matrix, matrix)
    wide = bias.astype(np.float64)
    v.target("layer.bias", dense(bias, 3.0), **place([5], out=[0], in_=[]))
    v.adds("layer.bias", 3 * wide[:, None], 3 * wide)
    v.target("other.bias", dense(bias, 6, "alpha/sqrt(r)", r=4), **place([5], out=[0], in_=[]))
    v.adds("other.bias", 3 * wide[:, None], 3 * wide)


@valid("LF-307")
def scale_rules(v: Vector) -> None:
    """One pair under the three rules: 5/4, 5/√4 and 5."""
    A, B = v.numbers(4, 7), v.numbers(6, 4)
    product = einsum("or,ri->oi", B, A)
    for key, rule, scale in (("a", "alpha/r", 1.25), ("b", "alpha/sqrt(r)", 2.5), ("c", "factor", 5.0)):
        v.target(key, lora(A, B, 5, rule), **place([6, 7], out=[0], in_=[1]))
        v.adds(key, scale * product, scale * product)


@valid("LF-306")
def scale_signs(v: Vector) -> None:
    """alpha may be negative, zero, and no multiple of anything; it is not rounded to the factors' dtype."""
    A, B = v.numbers(3, 7, dtype="bfloat16"), v.numbers(6, 3, dtype="bfloat16")
    product = einsum("or,ri->oi", B, A)
    for key, alpha in (("negative", -4.5), ("zero", 0), ("fine", 0.1), ("tiny", 1e-7), ("odd", 2.718281828459045)):
        v.target(key, lora(A, B, alpha), **place([6, 7], out=[0], in_=[1]))
        v.adds(key, alpha / 3 * product, alpha / 3 * product)


@valid()
def scale_sqrt(v: Vector) -> None:
    """alpha/sqrt(r) of a rank that is no square."""
    A, B = v.numbers(3, 7), v.numbers(6, 3)
    v.target("w", lora(A, B, 8, "alpha/sqrt(r)"), **place([6, 7], out=[0], in_=[1]))
    matrix = 8 / math.sqrt(3) * einsum("or,ri->oi", B, A)
    v.adds("w", matrix, matrix)


@valid("LF-106", "LF-108")
def dtypes(v: Vector) -> None:
    """Every float dtype, and two in one pair."""
    kinds = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    for first, second in (*zip(kinds, kinds, strict=True), ("float16", "bfloat16")):
        A, B = v.numbers(3, 7, dtype=first), v.numbers(6, 3, dtype=second)
        key = f"{first}.{second}"
        v.target(key, lora(A, B, 6), **place([6, 7], out=[0], in_=[1]))
        matrix = 2 * einsum("or,ri->oi", B, A)
        v.adds(key, matrix, matrix)


@valid("LF-303")
def lora_mid(v: Vector) -> None:
    """A Tucker core between B and A: [r, r, kh, kw]."""
    A, B, mid = v.numbers(4, 2), v.numbers(7, 4), v.numbers(4, 4, 3, 5)
    v.target("conv.weight", lora(A, B, 6, mid=mid), **place([7, 2, 3, 5], out=[0], in_=[1, 2, 3]))
    delta = 1.5 * einsum("om,mnyx,ni->oiyx", B, mid, A)
    v.adds("conv.weight", delta.reshape(7, 30), delta)
