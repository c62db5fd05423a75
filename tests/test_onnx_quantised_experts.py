"""QMoE: stacks of experts in few bits, found by names and by values, and rounded to their own codes again when that is asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import model, save, session
from installed import needs
from onnx import helper, numpy_helper

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare

E, IN, INNER = 3, 64, 96
SHAPES = {"up": (E, INNER, IN), "down": (E, IN, INNER)}
FORMS = {
    f"{bits} bits, {'blocks' if block else 'columns'}{', zero points' if zeros else ''}": (bits, block, zeros)
    for bits in (2, 4, 8)
    for block in (0, 32)
    for zeros in (False, True)
}


@pytest.fixture(autouse=True)
def _floats_stay_floats(monkeypatch):
    """The CPU's kernel for 8 bits rounds x to 8 bits as well, unless it is told not to (onnxruntime 1.32)."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "0")


def packed(codes, bits):
    """The lowest bits first."""
    per = 8 // bits
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    fields = filled.reshape(*filled.shape[:-1], -1, per).astype(np.int64)
    return (fields << (np.arange(per) * bits)).sum(-1).astype(np.uint8)


def drawn(shape, bits, block, zeros, seed, dtype=np.float32):
    """(the operator's tensors, W by its documentation, the step of every value)."""
    draw, (_, n, k) = np.random.default_rng(seed), shape
    count, middle = (k // block if block else 1), 2 ** (bits - 1)
    codes = draw.integers(0, 2**bits, shape)
    scale = (0.01 + 0.02 * draw.random((E, n, count))).astype(dtype)
    zero = draw.integers(middle - 1, middle + 2, (E, n, count)) if zeros else np.full((E, n, count), middle)
    step = np.repeat(scale.astype(np.float64), k // count, -1)
    weight = (codes - np.repeat(zero, k // count, -1)) * step
    if not block:
        scale, zero = scale[..., 0], zero[..., 0]
    return (packed(codes, bits), scale, packed(zero, bits) if zeros else None), weight, step


def graph(stacks, bits, block, dtype="float", **attributes):
    """Each row goes to one expert, with all its weight; ``stacks``: name → codes, scales, zero points."""
    up, down = (
        [f"{n}{role}" if t is not None else "" for role, t in zip(ROLES, stacks[n], strict=True)] for n in SHAPES
    )
    inputs = ["x", "p", *up[:2], "", *down[:2], "", "", "", "", up[2], down[2]]
    more = {"block_size": block} if block else {}
    made = model(f"g ({dtype}[N,{IN}] x, {dtype}[N,{E}] p) => ({dtype}[N,{IN}] y) {{ y = Identity(x) }}")
    wanted = {"k": 1, "activation_type": "relu", "normalize_routing_weights": 1, "expert_weight_bits": bits}
    made.graph.node[0].CopyFrom(
        helper.make_node("QMoE", inputs, ["y"], "moe", domain="com.microsoft", **{**wanted, **more, **attributes})
    )
    held = {f"{n}{role}": t for n in stacks for role, t in zip(ROLES, stacks[n], strict=True) if t is not None}
    made.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in held.items())
    return made


ROLES = ("_quantized", "_scales", "_zeros")
"""What the codes of a float weight are called by ONNX Runtime's quantisers, and what lies beside them."""


def computed(held, x, p):
    """By the operator's documentation: [experts, out, in], relu between."""
    chosen = p.argmax(1)
    inner = np.maximum(np.einsum("ni,noi->no", x.astype(np.float64), held["up"][chosen]), 0)
    return np.einsum("ni,noi->no", inner, held["down"][chosen])


def feeds(dtype=np.float32):
    draw = np.random.default_rng(0)
    return {k: draw.standard_normal((8, n)).astype(dtype) for k, n in (("x", IN), ("p", E))}


def change(weight, steps, seed, *, bound=False):
    """A pair of that size for every expert."""
    draw, (_, out, in_) = np.random.default_rng(seed), weight.shape
    a, b = draw.standard_normal((E, seed, in_)), draw.standard_normal((E, out, seed))
    scale = float(steps / np.std(b @ a))
    place = lf.Placement(weight.shape, (1,), (2,), (0,))
    drawn = sketch(weight.astype(np.float32), place) if bound else None
    pair = lf.Lora(a.astype(np.float32), b.astype(np.float32), scale, "factor")
    return lf.Update((pair,), place if bound else None, sketch=drawn)


def case(form, dtype=np.float32, **attributes):
    """(model, name → W, name → steps)."""
    bits, block, zeros = FORMS[form]
    found = {n: drawn(shape, bits, block, zeros, seed, dtype) for seed, (n, shape) in enumerate(SHAPES.items(), 3)}
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    made = graph({n: f[0] for n, f in found.items()}, bits, block, kind, **attributes)
    return made, {n: f[1] for n, f in found.items()}, {n: f[2] for n, f in found.items()}


def stored(path, name, form):
    """(codes, zero points, steps) of a file, each [experts, out, in]: unpacked here and not by what is tested."""
    bits, block, _ = FORMS[form]
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    codes, scale = fields(held[f"{name}_quantized"], bits), held[f"{name}_scales"].astype(np.float64)
    _, n, k = codes.shape
    count = k // block if block else 1
    zero = np.full(scale.shape, 2 ** (bits - 1))
    if f"{name}_zeros" in held:
        zero = fields(held[f"{name}_zeros"], bits)[..., : scale.shape[-1]]
    return codes, *(np.repeat(each.reshape(E, n, count), k // count, -1) for each in (zero, scale))


def fields(bytes_, bits):
    return ((bytes_[..., None] >> np.arange(0, 8, bits)) & (2**bits - 1)).reshape(*bytes_.shape[:-1], -1)


@pytest.mark.parametrize(
    ("form", "bound"),
    [
        *((form, False) for form in FORMS),
        *((form, True) for form in ("4 bits, blocks, zero points", "8 bits, columns")),
    ],
)
def test_every_expert_is_rounded_to_its_own_codes(form, bound, tmp_path):
    needs("QMoE")
    made, held, steps = case(form)
    names = dict(zip(SHAPES, ("w1", "w2") if bound else SHAPES, strict=True))
    rename(made, names)
    path, out, fed = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx", feeds()
    assert relative_error(session(path).run(None, fed)[0], computed(held, **fed)) <= 2e-6
    base, bits = open_base(path), FORMS[form][0]
    for site, weight in zip((s for s in base.index.sites if s.position in (2, 5)), held.values(), strict=True):
        read = base.values.read(site)
        assert read is not None
        np.testing.assert_allclose(read[0], weight, rtol=1e-6)
    size = {2: 0.6, 4: 1.5, 8: 2.0}[bits]
    targets = {n: change(w, size * steps[n].mean(), r, bound=bound) for r, (n, w) in enumerate(held.items(), 2)}
    merge(lf.Adapter(targets), base, out, requantize=True)
    onnx.checker.check_model(out, full_check=True)
    changed = {}
    for name, weight in held.items():
        codes, zero, step = stored(out, names[name], form)
        nearest = np.clip((weight + targets[name].matrix()) / step + zero, 0, 2**bits - 1)
        assert (np.abs(codes - nearest) <= 0.5005).all()
        changed[name] = (codes - zero) * step
    found = session(out).run(None, fed)[0]
    assert relative_error(found, computed(changed, **fed)) <= 2e-6
    assert relative_error(found, computed(held, **fed)) > 0.01


def test_gate_and_up_in_turns_are_found_and_rounded_where_they_stand(tmp_path):
    form = "4 bits, blocks"
    made, held, steps = case(form, swiglu_fusion=1, activation_type="swiglu")
    held["up"] = np.concatenate([held["up"][:, ::2], held["up"][:, 1::2]], 1)  # as the module has them
    target = change(held["up"], 1.5 * steps["up"].mean(), 2, bound=True)
    path, out = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    merge(lf.Adapter({"m.gate_up_proj": target}), open_base(path), out, requantize=True)
    codes, zero, step = stored(out, "up", form)
    gate, up = np.split(held["up"] + target.matrix(), 2, 1)
    wanted = np.stack([gate, up], 2).reshape(codes.shape)
    assert (np.abs(codes - np.clip(wanted / step + zero, 0, 15)) <= 0.5005).all()


def rename(made, names):
    """Call the stacks otherwise."""
    for tensor in made.graph.initializer:
        old, (stack, role) = tensor.name, tensor.name.split("_")
        tensor.name = f"{names[stack]}_{role}"
        made.graph.node[0].input[list(made.graph.node[0].input).index(old)] = tensor.name


def test_scales_of_16_bits_are_read_too(tmp_path):
    needs("QMoE")
    form = "4 bits, blocks, zero points"
    made, held, steps = case(form, np.float16)
    path, out = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    target = change(held["up"], 1.5 * steps["up"].mean(), 2)
    merge(lf.Adapter({"up": target}), open_base(path), out, requantize=True)
    codes, zero, step = stored(out, "up", form)
    nearest = np.clip((held["up"] + target.matrix()) / step + zero, 0, 15)
    assert (np.abs(codes - nearest) <= 0.5005).all()
    for one, other in zip(stored(out, "down", form), stored(path, "down", form), strict=True):
        np.testing.assert_array_equal(one, other)
    assert session(out).run(None, feeds(np.float16))[0].dtype == np.float16


@pytest.mark.peer
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 32), (4, 0), (8, 0)])
def test_what_onnx_runtimes_own_quantiser_packs(bits, block, tmp_path):
    """``cuda_quantizer`` gives the operator's raw layout (``weights_prepacked`` = 0) for every provider."""
    torch = pytest.importorskip("torch")
    quantizer = pytest.importorskip("onnxruntime.quantization.cuda_quantizer", reason="onnxruntime 1.32").CudaQuantizer
    draw, stacks, held = np.random.default_rng(6), {}, {}
    for name, shape in SHAPES.items():
        weight = draw.standard_normal(shape).astype(np.float32)
        made = [quantised(quantizer, torch.from_numpy(w), bits, block) for w in weight]
        stacks[name] = (*tuple(np.stack([np.asarray(m[i]) for m in made]) for i in range(2)), None)
        held[name] = weight
    path, out = save(graph(stacks, bits, block, weights_prepacked=0), tmp_path / "base.onnx"), tmp_path / "out.onnx"
    size = 0.5 if bits == 4 else 0.05
    targets = {n: change(w, size, r, bound=True) for r, (n, w) in enumerate(held.items(), 2)}
    merge(lf.Adapter({f"m.{n}": t for n, t in targets.items()}), open_base(path), out, requantize=True)
    before, after = (
        {n: stored(p, n, f"{bits} bits, {'blocks' if block else 'columns'}") for n in SHAPES} for p in (path, out)
    )
    changed = {}
    for name, (codes, zero, step) in after.items():
        was = (before[name][0] - zero) * step
        assert relative_error(was, held[name]) < (0.2 if bits == 4 else 0.02)
        wanted = np.clip((was + targets[name].matrix()) / step + zero, 0, 2**bits - 1)
        assert (np.abs(codes - wanted) <= 0.5005).all()
        changed[name] = (codes - zero) * step
    assert relative_error(session(out).run(None, feeds())[0], computed(changed, **feeds())) <= 2e-6


def quantised(quantizer, weight, bits, block):
    """(codes, scales) of one expert's [out, in]."""
    if block:
        return quantizer.matmulnbits_blockwise_quantize(weight, bits, block)
    return quantizer.qmoe_symmetric_per_channel_quantize(weight, bits)


def test_an_attach_says_why_nothing_runs_beside_it_and_that_a_merge_does(tmp_path):
    made, held, _ = case("4 bits, columns")
    base, ours = open_base(save(made, tmp_path / "base.onnx")), lf.Adapter({"up": change(held["up"], 0.1, 2)})
    with pytest.raises(lf.LoraFormatError, match=r"LF-608  moe: .*QMoE goes on with its product itself"):
        prepare("attach", [("default", ours)], base, Options(tmp_path / "out.onnx"))
    with pytest.raises(lf.LoraFormatError, match=r"LF-608  moe: [^@]*@ up\n +--requantize"):
        merge(ours, base, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


UNKNOWN = {
    "fp4": ({"quant_type": "fp4"}, "fp4.*, whose steps are not equal"),
    "three bits": ({"expert_weight_bits": 3}, "no stack of matrices in 2, 4 or 8 bits"),
    "prepacked": ({"weights_prepacked": 1}, "laid out for one processor"),
    "blocks that do not fill a row": ({"block_size": 48}, "in steps that are not known exactly"),
    "another number of scales": ({"block_size": 16}, "in steps that are not known exactly"),
    "other bits for one stack": ({"fc1_expert_weight_bits": 8}, "in steps that are not known exactly"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_codes_that_are_not_known_exactly_are_refused(kind, tmp_path):
    attributes, said = UNKNOWN[kind]
    made, held, _ = case("4 bits, blocks", **attributes)
    base = open_base(save(made, tmp_path / "base.onnx"))
    with pytest.raises(lf.LoraFormatError, match=said):
        merge(lf.Adapter({"up": change(held["up"], 0.1, 2)}), base, tmp_path / "out.onnx", requantize=True)


def square(told, *, prepacked=False):
    """Stacks whose up is square: which way its bytes lie, only ``down`` can tell, or the attribute."""
    stacks = {
        "up": drawn((E, IN, IN), 4, 0, False, 3)[0],
        "down": drawn((E, INNER if told else IN, IN), 4, 0, False, 4)[0],
    }
    return graph(stacks, 4, 0, **({"weights_prepacked": 0} if prepacked else {}))


@pytest.mark.parametrize(("told", "attribute"), [(False, False), (True, False), (False, True)])
def test_square_experts_of_which_nothing_tells_how_they_lie_are_refused(told, attribute, tmp_path):
    base = open_base(save(square(told, prepacked=attribute), tmp_path / "base.onnx"))
    place = lf.Placement((E, IN, IN), (1,), (2,), (0,))
    ours = lf.Adapter({"up": replace(change(np.ones((E, IN, IN)), 0.05, 2), placement=place)})
    if told or attribute:
        merge(ours, base, tmp_path / "out.onnx", requantize=True)
    else:
        with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*in steps that are not known exactly"):
            merge(ours, base, tmp_path / "out.onnx", requantize=True)


def test_experts_packed_for_cuda_are_not_taken_for_raw_ones(tmp_path):
    """[experts, in, bytes of out] is what the default means there: its scales have as many rows as there are outs."""
    stacks = {n: drawn(shape, 4, 0, False, 3)[0] for n, shape in SHAPES.items()}
    turned = {n: (packed(fields(s[0], 4).swapaxes(1, 2), 4), *s[1:]) for n, s in stacks.items()}
    base = open_base(save(graph(turned, 4, 0), tmp_path / "base.onnx"))
    place = lf.Placement((E, IN, INNER), (1,), (2,), (0,))
    ours = lf.Adapter({"up": replace(change(np.ones((E, IN, INNER)), 0.05, 2), placement=place)})
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*in steps that are not known exactly"):
        merge(ours, base, tmp_path / "out.onnx", requantize=True)
