"""Small models whose weight is kept in fewer bits, in every form that quantisers write, with the weight that each stands for.

The weight is computed here by the formulas of the operators' own documentation, in float64, never by the code under test.
"""

from __future__ import annotations

import numpy as np
from graphs import model
from onnx import TensorProto, helper, numpy_helper

OUT, IN, BLOCK = 48, 40, 16
"""K = 40 is no whole number of blocks of 16."""

KEY = "m.q.weight"


def codes(*shape, low, high, seed):
    return np.random.default_rng(seed).integers(low, high, shape)


def scales(*shape, seed=5):
    """Steps of W, each another one."""
    return (0.01 * (1 + np.random.default_rng(seed).random(shape))).astype(np.float32)


def filled(text, *, opset=21, **tensors):
    """A textual graph with these initializers: (values, data type) for a type that numpy lacks."""
    made = model(text, opset=opset)
    for name, held in tensors.items():
        if isinstance(held, tuple):
            values, kind = held
            made.graph.initializer.append(helper.make_tensor(name, kind, values.shape, values.ravel()))
        else:
            made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(held), name))
    return made


HEAD = f"g (float[N,T,{IN}] x) => (float[N,T,{OUT}] y)"
QUERY = '["/m/q/MatMul"]'
INT8 = codes(IN, OUT, low=-63, high=64, seed=1)  # ONNX Runtime adds products of 16 bits on older processors
ZERO8 = codes(OUT, low=-9, high=9, seed=2)
UINT8 = INT8 + 128
PER_OUT = scales(OUT)


def affine(q, scale, zero=0):
    """W [out, in] of codes [in, out]."""
    return ((q.astype(np.float64) - zero) * scale).T


def packed(values, bits):
    """Values along the last axis, the lowest bits of a byte first."""
    per = 8 // bits
    filled_up = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per)])
    fields = filled_up.reshape(*filled_up.shape[:-1], -1, per)
    return (fields << (bits * np.arange(per))).sum(-1).astype(np.uint8)


def cast_mul():
    step = PER_OUT[None]
    body = f"f = Cast <to = 1> (q) w = Mul(f, s) {QUERY} y = MatMul(x, w)"
    return filled(f"{HEAD} {{ {body} }}", q=INT8.astype(np.int8), s=step), affine(INT8, step)


def cast_sub_mul_transpose():
    """[out, in] as torch keeps it, the scale first."""
    body = f"f = Cast <to = 1> (q) c = Sub(f, z) v = Mul(s, c) w = Transpose(v) {QUERY} y = MatMul(x, w)"
    z = 128 + ZERO8.astype(np.float32)
    made = filled(f"{HEAD} {{ {body} }}", q=UINT8.T.astype(np.uint8), s=PER_OUT[:, None], z=z[:, None])
    return made, affine(UINT8, PER_OUT, 128 + ZERO8)


def blocks_and_reshape():
    q, step = INT8.reshape(5, 8, OUT), scales(5, 1, OUT)
    body = f"f = Cast <to = 1> (q) v = Mul(f, s) w = Reshape(v, shape) {QUERY} y = MatMul(x, w)"
    made = filled(f"{HEAD} {{ {body} }}", q=q.astype(np.int8), s=step, shape=np.array([0, 0], np.int64)[:0])
    made.graph.initializer.pop()
    made.graph.initializer.append(numpy_helper.from_array(np.array([IN, OUT], np.int64), "shape"))
    return made, (q * step.astype(np.float64)).reshape(IN, OUT).T


def dequantised(zero):
    def make():
        z = ZERO8 if zero else np.zeros(OUT, int)
        body = f"w = DequantizeLinear <axis = 1> (q, s, z) {QUERY} y = MatMul(x, w)"
        made = filled(f"{HEAD} {{ {body} }}", q=INT8.astype(np.int8), s=PER_OUT, z=z.astype(np.int8))
        return made, affine(INT8, PER_OUT, z)

    return make


def gemm():
    """[out, in] and a bias, one step for all."""
    body = '["/m/q/Gemm"] y = Gemm <transB = 1> (x, w, b)'
    head = f"g (float[N,{IN}] x) => (float[N,{OUT}] y) <float[{OUT}] b>"
    text = f"{head} {{ w = DequantizeLinear(q, s, z) {body} }}"
    made = filled(text, q=UINT8.T.astype(np.uint8), s=np.float32(0.013), z=np.uint8(117))
    return made, affine(UINT8, np.float64(np.float32(0.013)), 117)


def int4_blocks():
    q, step = codes(IN, OUT, low=-8, high=8, seed=3), scales(5, OUT)
    body = f"w = DequantizeLinear <axis = 0, block_size = 8> (q, s) {QUERY} y = MatMul(x, w)"
    made = filled(f"{HEAD} {{ {body} }}", q=(q.astype(np.int8), TensorProto.INT4), s=step)
    return made, affine(q, np.repeat(step, 8, 0).astype(np.float64))


def between_pairs():
    """The form of ONNX Runtime's static quantiser."""
    body = f"""a = QuantizeLinear(x, xs, xz)  f = DequantizeLinear(a, xs, xz)
      w = DequantizeLinear <axis = 1> (q, s, z)  {QUERY} p = MatMul(f, w)
      c = QuantizeLinear(p, ps, pz)  y = DequantizeLinear(c, ps, pz)"""
    made = filled(
        f"{HEAD} {{ {body} }}", q=INT8.astype(np.int8), s=PER_OUT, z=ZERO8.astype(np.int8),
        xs=np.float32(0.031), xz=np.uint8(121), ps=np.float32(0.11), pz=np.uint8(131),
    )  # fmt: skip
    return made, affine(INT8, PER_OUT, ZERO8)


def trained_for_8_bits():
    """Weights as floats, which the graph rounds itself."""
    w = np.random.default_rng(9).standard_normal((IN, OUT)).astype(np.float32)
    body = f"q = QuantizeLinear(v, s)  w = DequantizeLinear(q, s)  {QUERY} y = MatMul(x, w)"
    made = filled(f"{HEAD} {{ {body} }}", v=w, s=np.float32(0.025))
    rounded = np.clip(np.round(w / np.float32(0.025)), 0, 255) * np.float64(np.float32(0.025))
    return made, rounded.T


SUMS = """a, xs, xz = DynamicQuantizeLinear(x)  ["/m/q/MatMul_quant"] i = MatMulInteger(a, q, xz, z)
  f = Cast <to = 1> (i)  t = Mul(xs, s)  y = Mul(f, t)"""


def integer():
    made = filled(f"{HEAD} {{ {SUMS} }}", q=INT8.astype(np.int8), s=PER_OUT, z=ZERO8.astype(np.int8))
    return made, affine(INT8, PER_OUT, ZERO8)


def integer_for_all():
    made = filled(f"{HEAD} {{ {SUMS} }}", q=UINT8.astype(np.uint8), s=np.float32(0.017), z=np.uint8(113))
    return made, affine(UINT8, np.float64(np.float32(0.017)), 113)


def dynamic():
    """What ONNX Runtime makes of the form above when it optimises offline."""
    body = '["/m/q/MatMul_quant"] y = com.microsoft.DynamicQuantizeMatMul(x, q, s, z, b)'
    text = f"{HEAD} <float[{OUT}] b> {{ {body} }}"
    made = filled(text, q=INT8.astype(np.int8), s=PER_OUT, z=ZERO8.astype(np.int8))
    return made, affine(INT8, PER_OUT, ZERO8)


def integer_to_float():
    body = """a, xs, xz = DynamicQuantizeLinear(x)
      ["/m/q/MatMul_quant"] y = com.microsoft.MatMulIntegerToFloat(a, q, xs, s, xz, z)"""
    made = filled(f"{HEAD} {{ {body} }}", q=INT8.astype(np.int8), s=PER_OUT, z=ZERO8.astype(np.int8))
    return made, affine(INT8, PER_OUT, ZERO8)


def qlinear():
    body = """a = QuantizeLinear(x, xs, xz)
      ["/m/q/MatMul_quant"] c = QLinearMatMul(a, xs, xz, q, s, z, ps, pz)  y = DequantizeLinear(c, ps, pz)"""
    made = filled(
        f"{HEAD} {{ {body} }}", q=INT8.astype(np.int8), s=np.float32(0.012), z=np.int8(-7),
        xs=np.float32(0.031), xz=np.uint8(121), ps=np.float32(0.11), pz=np.uint8(131),
    )  # fmt: skip
    return made, affine(INT8, np.float64(np.float32(0.012)), -7)


def qgemm():
    body = """a = QuantizeLinear(x, xs, xz)
      ["/m/q/Gemm_quant"] y = com.microsoft.QGemm <transB = 1, alpha = 1.0> (a, xs, xz, q, s, z)"""
    text = f"g (float[N,{IN}] x) => (float[N,{OUT}] y) {{ {body} }}"
    made = filled(
        text, q=INT8.T.astype(np.int8), s=PER_OUT, z=np.zeros(OUT, np.int8), xs=np.float32(0.031), xz=np.uint8(121)
    )
    return made, affine(INT8, PER_OUT)


def square():
    """Where a step for each out could be taken for one for each in."""
    q, step = codes(IN, IN, low=-63, high=64, seed=7), scales(IN)
    body = """a = QuantizeLinear(x, xs, xz)
      ["/m/q/Gemm_quant"] y = com.microsoft.QGemm <transB = 1, alpha = 1.0> (a, xs, xz, q, s, z)"""
    text = f"g (float[N,{IN}] x) => (float[N,{IN}] y) {{ {body} }}"
    held = {"s": step, "z": np.zeros(IN, np.int8), "xs": np.float32(0.031), "xz": np.uint8(121)}
    return filled(text, q=q.T.astype(np.int8), **held), affine(q, step)


def nbits(bits, zero):
    """``zero``: None for the middle of the range, packed, or float."""

    def make():
        count = -(-IN // BLOCK)
        q, step = codes(OUT, count, BLOCK, low=0, high=2**bits, seed=bits), scales(OUT, count)
        zeros = codes(OUT, count, low=1, high=2**bits - 1, seed=4)
        held = {"packed": packed(zeros, bits), "float": zeros.astype(np.float32) + np.float32(0.25)}.get(zero)
        given, tensors = ("", {}) if held is None else (", z", {"z": held})
        body = f"""["/m/q/MatMul_Q{bits}"] y = com.microsoft.MatMulNBits
          <K = {IN}, N = {OUT}, bits = {bits}, block_size = {BLOCK}> (x, q, s{given})"""
        made = filled(f"{HEAD} {{ {body} }}", q=packed(q, bits), s=step, **tensors)
        middle = {"packed": zeros, "float": zeros + 0.25}.get(zero, np.full((OUT, count), 2 ** (bits - 1)))
        weight = (q - middle[..., None]) * step[..., None].astype(np.float64)
        return made, weight.reshape(OUT, -1)[:, :IN]

    return make


def convolution():
    """x as an image [N, IN, T, 5]: the kernel is 3 wide."""
    q = codes(OUT, IN, 3, 1, low=-128, high=128, seed=6)
    text = f"""g (float[N,{IN},T,5] x) => (float[N,{OUT},M,5] y) <float[{OUT}] b>
      {{ w = DequantizeLinear <axis = 0> (q, s, z)  ["/m/q/Conv"] y = Conv <pads = [1, 0, 1, 0]> (x, w, b) }}"""
    made = filled(text, q=q.astype(np.int8), s=PER_OUT, z=np.zeros(OUT, np.int8))
    return made, q.reshape(OUT, -1) * PER_OUT[:, None].astype(np.float64)


def integer_convolution():
    q = codes(OUT, IN, 3, 1, low=0, high=256, seed=6)
    text = f"""g (float[N,{IN},T,5] x) => (float[N,{OUT},M,5] y)
      {{ a, xs, xz = DynamicQuantizeLinear(x)
         ["/m/q/Conv_quant"] i = ConvInteger <pads = [1, 0, 1, 0]> (a, q, xz, z)
         f = Cast <to = 1> (i)  t = Mul(xs, s)  y = Mul(f, t) }}"""
    made = filled(text, q=q.astype(np.uint8), s=np.float32(0.01), z=np.uint8(119))
    return made, (q.reshape(OUT, -1) - 119) * np.float64(np.float32(0.01))


TABLE = f"g (int64[N,T] x) => (float[N,T,{OUT}] y)"


def rows():
    """Rows of codes, then floats of them: ONNX Runtime's dynamic quantiser."""
    body = '["/m/q/Gather"] c = Gather(q, x)  y = DequantizeLinear(c, s, z)'
    made = filled(f"{TABLE} {{ {body} }}", q=UINT8.astype(np.uint8), s=np.float32(0.017), z=np.uint8(113))
    return made, affine(UINT8, np.float64(np.float32(0.017)), 113)


def rows_of_floats():
    body = 'f = Cast <to = 1> (q) w = Mul(f, s) ["/m/q/Gather"] y = Gather(w, x)'
    step = scales(IN, 1)
    return filled(f"{TABLE} {{ {body} }}", q=INT8.astype(np.int8), s=step), affine(INT8, step.astype(np.float64))


def rows_of_blocks(bits, zero):
    def make():
        q, step = codes(IN, OUT, low=0, high=2**bits, seed=bits), scales(IN, 3)
        zeros = codes(IN, 3, low=1, high=2**bits - 1, seed=4)
        given, tensors = (", z", {"z": packed(zeros, bits)}) if zero else ("", {})
        body = f"""["/m/q/Gather_Q{bits}"] y = com.microsoft.GatherBlockQuantized
          <bits = {bits}, block_size = {BLOCK}, quantize_axis = 1> (q, x, s{given})"""
        made = filled(f"{TABLE} {{ {body} }}", q=packed(q, bits), s=step, **tensors)
        middle = zeros if zero else np.full((IN, 3), 2 ** (bits - 1))
        return made, ((q.reshape(IN, 3, BLOCK) - middle[..., None]) * step[..., None].astype(np.float64)).reshape(
            IN, OUT
        ).T

    return make


FORMS = {
    "Cast, Mul": cast_mul,
    "Cast, Sub, Mul, Transpose": cast_sub_mul_transpose,
    "Cast, Mul, Reshape": blocks_and_reshape,
    "DequantizeLinear": dequantised(zero=False),
    "DequantizeLinear, zero points": dequantised(zero=True),
    "DequantizeLinear, Gemm": gemm,
    "DequantizeLinear, int4 blocks": int4_blocks,
    "QDQ": between_pairs,
    "QuantizeLinear, DequantizeLinear": trained_for_8_bits,
    "MatMulInteger": integer,
    "MatMulInteger, uint8": integer_for_all,
    "DynamicQuantizeMatMul": dynamic,
    "MatMulIntegerToFloat": integer_to_float,
    "QLinearMatMul": qlinear,
    "QGemm": qgemm,
    "MatMulNBits 4": nbits(4, None),
    "MatMulNBits 4, zero points": nbits(4, "packed"),
    "MatMulNBits 4, float zero points": nbits(4, "float"),
    "MatMulNBits 8": nbits(8, None),
    "MatMulNBits 8, zero points": nbits(8, "packed"),
    "MatMulNBits 2": nbits(2, "packed"),
    "Conv": convolution,
    "ConvInteger": integer_convolution,
    "Gather, DequantizeLinear": rows,
    "Cast, Mul, Gather": rows_of_floats,
    "GatherBlockQuantized 4": rows_of_blocks(4, zero=True),
    "GatherBlockQuantized 8": rows_of_blocks(8, zero=False),
    "a square QGemm": square,
}
"""Name → a function that gives (model, W [out, in] in float64)."""
