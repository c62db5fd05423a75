"""Adapters on live JAX parameters: what the branch computes is what merged parameters compute, and no ΔW is formed."""

import re
from pathlib import Path

import numpy as np
import pytest

import loraformat as lf
from loraformat import Adapter, Delta, Lora, LoraFormatError, Magnitude, Replace, Rows, Update
from loraformat.axes import Placement
from loraformat.testing import relative_error

jax = pytest.importorskip("jax", reason="needs jax: the peers extra")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx", reason="needs flax: the peers extra")
from flax import linen as nn  # noqa: E402
from jax import lax  # noqa: E402

from loraformat_converters import jax_live  # noqa: E402

pytestmark = pytest.mark.peer
DRAW = np.random.default_rng(5)


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32) * 0.3


def lora(place, rank=2, alpha=3.0, shared=""):
    """A pair for a placement; ``shared``: which factor has no batch of its own, ``A`` or ``B``."""
    *batch, out, in_ = place.matrix_shape
    ones = [1] * len(batch)
    a = normal(*(ones if shared == "A" else batch), rank, in_)
    b = normal(*(ones if shared == "B" else batch), out, rank)
    return Update((Lora(a, b, alpha, "alpha/r"),), place)


def changed(params, adapter):
    """W + ΔW by numpy alone, of a flat dict of parameters."""
    return {k: np.asarray(v) + (adapter[k].delta() if k in adapter else 0) for k, v in params.items()}


def check(function, params, adapter, *args, formed=()):
    """Branch, merged and numpy agree; only what is said has its ΔW formed."""
    branched = jax_live.branch(params, adapter)
    wanted = np.asarray(function({k: jnp.asarray(v) for k, v in changed(params, adapter).items()}, *args))
    plain = np.asarray(function({k: jnp.asarray(v) for k, v in params.items()}, *args))
    assert relative_error(np.asarray(branched(function, *args)), wanted) < 2e-6
    assert relative_error(np.asarray(jax.jit(lambda b: b(function, *args))(branched)), wanted) < 2e-6
    assert relative_error(np.asarray(function(jax_live.apply(params, adapter), *args)), wanted) < 2e-6
    assert relative_error(plain, wanted) > 0.01
    assert [name for name, _ in branched.formed(function, *args)] == list(formed)


LINEAR = Placement((7, 5), (1,), (0,))
X = normal(3, 4, 7)

PRODUCTS = {
    "x @ W": (LINEAR, lambda p, x: x @ p["w"], X),
    "x @ W.T": (Placement((5, 7), (0,), (1,)), lambda p, x: x @ p["w"].T, X),
    "W @ x": (Placement((5, 7), (0,), (1,)), lambda p, x: p["w"] @ x, normal(7, 3)),
    "the out side contracted": (LINEAR, lambda p, x: x @ p["w"].T, normal(3, 5)),
    "heads out": (Placement((7, 2, 3), (1, 2), (0,)), lambda p, x: jnp.einsum("btd,dnh->btnh", x, p["w"]), X),
    "heads first": (Placement((2, 7, 3), (0, 2), (1,)), lambda p, x: jnp.einsum("btd,ndh->bnth", x, p["w"]), X),
    "heads in": (
        Placement((2, 3, 5), (2,), (0, 1)),
        lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["w"]),
        normal(3, 4, 2, 3),
    ),
    "half of the in side": (
        Placement((2, 3, 5), (2,), (0, 1)),
        lambda p, x: jnp.einsum("bn,nhd->bhd", x, p["w"]),
        normal(4, 2),
    ),
    "reshaped": (Placement((7, 2, 3), (1, 2), (0,)), lambda p, x: x @ p["w"].reshape(7, 6), X),
    "divided": (
        Placement((6, 5), (1,), (0,)),
        lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["w"].reshape(2, 3, 5)),
        normal(3, 4, 2, 3),
    ),
    "transposed and reshaped": (
        Placement((7, 2, 3), (1, 2), (0,)),
        lambda p, x: x @ p["w"].transpose(0, 2, 1).reshape(7, 6),
        X,
    ),
    "columns": (LINEAR, lambda p, x: x @ p["w"][:, 1:4], X),
    "rows": (LINEAR, lambda p, x: x @ p["w"][2:5], normal(4, 3)),
    "looked up": (Placement((7, 5), (1,), (0,)), lambda p, x: jnp.take(p["w"], x, axis=0), np.array([[1, 6], [0, 1]])),
    "looked up across": (Placement((5, 7), (0,), (1,)), lambda p, x: jnp.take(p["w"], x, axis=1), np.array([1, 6, 2])),
    "cast": (LINEAR, lambda p, x: x @ p["w"].astype(jnp.float32), X),
    "kept for the way back": (LINEAR, lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x), X),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_goes_through_the_factors(name):
    place, function, x = PRODUCTS[name]
    check(function, {"w": normal(*place.shape)}, Adapter({"w": lora(place)}, names="flax"), x)


@pytest.mark.parametrize("shared", ["", "A", "B"])
def test_experts_with_shared_factors(shared):
    place = Placement((3, 7, 5), (2,), (1,), (0,))
    adapter = Adapter({"w": lora(place, shared=shared)}, names="flax")
    check(lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]), {"w": normal(3, 7, 5)}, adapter, normal(3, 4, 7))


@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("axis", [0, 1])
def test_layers_that_a_scan_runs_through(axis, shared):
    shape = (3, 7, 7) if axis == 0 else (7, 3, 7)
    rest = [a for a in range(3) if a != axis]
    adapter = Adapter({"w": lora(Placement(shape, (rest[1],), (rest[0],), (axis,)), shared=shared)}, names="flax")

    def run(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.moveaxis(p["w"], axis, 0))[0]

    check(run, {"w": normal(*shape)}, adapter, normal(4, 7))


def test_layers_that_are_indexed_one_by_one():
    adapter = Adapter({"w": lora(Placement((3, 7, 7), (2,), (1,), (0,)))}, names="flax")

    def run(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i])
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), x)

    check(run, {"w": normal(3, 7, 7)}, adapter, normal(4, 7))


def test_a_branch_that_is_chosen_at_run_time():
    adapter = Adapter({"w": lora(Placement((7, 7), (1,), (0,)))}, names="flax")

    def run(p, x):
        return lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w.T, p["w"])

    for sign in (1, -1):
        check(run, {"w": normal(7, 7)}, adapter, sign * np.abs(normal(4, 7)))


def test_what_needs_the_numbers_gets_them_and_is_told():
    adapter = Adapter({"w": lora(LINEAR)}, names="flax")
    check(lambda p, x: x @ jnp.tanh(p["w"]), {"w": normal(7, 5)}, adapter, X, formed=["w"])


CONVS = {
    "same": {"padding": "SAME"},
    "strided": {"strides": (2, 1), "padding": "VALID"},
    "dilated": {"kernel_dilation": (2, 1), "padding": "SAME"},
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_goes_through_r_channels(name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 2), **CONVS[name])(x)

    x = normal(2, 6, 7, 5)
    params = Net().init(jax.random.key(1), x)
    adapter = Adapter({"Conv_0/kernel": lora(Placement((3, 2, 5, 4), (3,), (2, 0, 1)))}, names="flax")
    compare_linen(Net(), params, adapter, x)


class Small(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 7)(ids)
        x = nn.relu(nn.Dense(6)(x))
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x, x)
        x = nn.LayerNorm()(x)
        return nn.DenseGeneral((3, 4))(x)


SMALL = {
    "Embed_0/embedding": Placement((11, 7), (1,), (0,)),
    "Dense_0/kernel": Placement((7, 6), (1,), (0,)),
    "MultiHeadDotProductAttention_0/query/kernel": Placement((6, 2, 4), (1, 2), (0,)),
    "MultiHeadDotProductAttention_0/out/kernel": Placement((2, 4, 6), (2,), (0, 1)),
    "DenseGeneral_0/kernel": Placement((6, 3, 4), (1, 2), (0,)),
}
IDS = np.array([[1, 9, 3], [0, 5, 10]])


def small():
    params = Small().init(jax.random.key(0), IDS)
    return params, Adapter({key: lora(place) for key, place in SMALL.items()}, names="flax")


def compare_linen(model, params, adapter, x):
    flat = {key: update.delta() for key, update in adapter.items()}
    wanted = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + flat.get("/".join(entry.key for entry in path[1:]), 0), params
    )
    branched = jax_live.branch(params, adapter)
    expected = np.asarray(model.apply(wanted, x))
    assert relative_error(np.asarray(branched(model.apply, x)), expected) < 2e-6
    assert relative_error(np.asarray(model.apply(branched.merged(), x)), expected) < 2e-6
    assert relative_error(np.asarray(model.apply(params, x)), expected) > 0.01
    assert branched.formed(model.apply, x) == []


def test_a_linen_model_is_called_unchanged():
    compare_linen(Small(), *small(), IDS)


def test_vmap_and_jit_and_grad():
    params, adapter = small()
    branched = jax_live.branch(params, adapter)
    one = branched(Small().apply, IDS)
    mapped = jax.jit(jax.vmap(lambda ids: branched(Small().apply, ids[None])[0]))(IDS)
    assert relative_error(np.asarray(mapped), np.asarray(one)) < 2e-6

    def loss(factors):
        return (branched.with_factors(factors)(Small().apply, IDS) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(branched.factors)
    key, at = "Dense_0/kernel", (3, 1)
    for role in ("lora_a", "lora_b"):
        step = np.zeros(branched.factors[key][role].shape, np.float32)
        step[at if role == "lora_a" else at[::-1]] = 1e-2
        ways = [
            loss({**branched.factors, key: {**branched.factors[key], role: branched.factors[key][role] + sign * step}})
            for sign in (1, -1)
        ]
        slope = float((ways[0] - ways[1]) / 2e-2)
        assert slope == pytest.approx(float((gradient[key][role] * (step / 1e-2)).sum()), rel=2e-2)


def test_factors_are_trained_and_saved(tmp_path):
    params, adapter = small()
    branched = jax_live.branch(params, adapter)
    assert lf.digest(branched.adapter()) == lf.digest(adapter)
    target = np.asarray(Small().apply(params, IDS)) + 0.1

    @jax.jit
    def step(factors):
        loss, slope = jax.value_and_grad(
            lambda f: ((branched.with_factors(f)(Small().apply, IDS) - target) ** 2).mean()
        )(factors)
        return loss, jax.tree_util.tree_map(lambda f, g: f - 0.05 * g, factors, slope)

    factors, losses = branched.factors, []
    for _ in range(20):
        loss, factors = step(factors)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    trained = branched.with_factors(factors)
    lf.save(trained.adapter(), tmp_path / "a.lora.safetensors")
    again = jax_live.apply(params, lf.load(tmp_path / "a.lora.safetensors"))
    expected = np.asarray(trained(Small().apply, IDS))
    assert relative_error(np.asarray(Small().apply(again, IDS)), expected) < 2e-6


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from loraformat_converters import jax_live.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    params, adapter = small()
    factors = jax_live.branch(params, adapter).factors
    names = {"params": params, "adapter": adapter, "model": Small(), "x": IDS, "jax": jax, "lf": lf, "trained": factors}
    names["loss"] = lambda branched: (branched(Small().apply, IDS) ** 2).sum()
    exec(code, names)
    assert relative_error(np.asarray(names["y"]), np.asarray(Small().apply(names["merged"], IDS))) < 2e-6
    assert names["grads"].keys() == adapter.keys()
    assert lf.digest(lf.load(tmp_path / "trained.lora.safetensors")) == lf.digest(adapter)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(7, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])
        self.conv = nnx.Conv(3, 4, (2,), rngs=rngs)

    def __call__(self, x, scale=1.0):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.conv(x) * scale


def test_an_nnx_module_is_called_unchanged():
    module = Twin(nnx.Rngs(3))
    places = {
        "layers/0/kernel": Placement((7, 5), (1,), (0,)),
        "layers/1/kernel": Placement((5, 3), (1,), (0,)),
        "conv/kernel": Placement((2, 3, 4), (2,), (1, 0)),
    }
    adapter = Adapter({key: lora(place) for key, place in places.items()}, names="flax")
    branched = jax_live.branch(module, adapter)
    plain = np.asarray(module(X, scale=2.0))
    got = np.asarray(branched(lambda m, x: m(x, scale=2.0), X))
    assert branched.formed(lambda m, x: m(x), X) == []
    for i, layer in enumerate(module.layers):
        layer.kernel[...] = layer.kernel[...] + adapter[f"layers/{i}/kernel"].delta()
    module.conv.kernel[...] = module.conv.kernel[...] + adapter["conv/kernel"].delta()
    wanted = np.asarray(module(X, scale=2.0))
    assert relative_error(got, wanted) < 2e-6
    assert relative_error(np.asarray(branched.merged()(X, scale=2.0)), wanted) < 2e-6
    assert relative_error(plain, wanted) > 0.01


KINDS = {
    "dora": lambda: Update((lora(LINEAR)["lora"], Magnitude(np.abs(normal(5)) + 1)), LINEAR),
    "delta": lambda: Update((Delta(normal(5, 7), 0.5, "factor"),), LINEAR),
    "replace": lambda: Update((Replace(normal(7, 5)),), LINEAR),
    "rows": lambda: Update((Rows(normal(2, 5), np.array([1, 4])),), LINEAR),
    "replace+lora": lambda: Update((Replace(normal(7, 5)), lora(LINEAR)["lora"]), LINEAR),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_kind_is_merged_as_the_core_has_it(kind):
    update, weight = KINDS[kind](), normal(7, 5)
    adapter = Adapter({"w": update}, names="flax")
    wanted = update.apply(weight)
    assert relative_error(np.asarray(jax.jit(lambda p: jax_live.apply(p, adapter)["w"])({"w": weight})), wanted) < 1e-6
    branched = jax_live.branch({"w": jnp.asarray(weight)}, adapter)
    assert relative_error(np.asarray(branched(lambda p, x: x @ p["w"], X)), X @ wanted) < 2e-6


def test_half_precision_keeps_the_dtype_of_the_model():
    adapter = Adapter({"w": lora(LINEAR)}, names="flax")
    params = {"w": jnp.asarray(normal(7, 5), jnp.bfloat16)}
    out = jax_live.branch(params, adapter)(lambda p, x: x @ p["w"], jnp.asarray(X, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    wanted = X @ (np.asarray(params["w"], np.float32) + adapter["w"].delta())
    assert relative_error(np.asarray(out, np.float32), wanted) < 1e-2
    assert jax_live.apply(params, adapter)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("targets", "settings", "rule"),
    [
        ({"v": LINEAR}, {}, "LF-602"),
        ({"w": Placement((7, 6), (1,), (0,))}, {}, "LF-606"),
        ({"w": LINEAR}, {"names": {"x": "w"}}, "LF-705"),
        ({"w": LINEAR, "v": LINEAR}, {"names": {"v": "w"}}, "LF-603"),
        ({"w": LINEAR}, {"axes": {"w": "out,in"}}, "LF-605"),
    ],
)
def test_what_is_not_found_or_not_known_is_refused(targets, settings, rule):
    adapter = Adapter({key: lora(place) for key, place in targets.items()}, names="flax")
    with pytest.raises(LoraFormatError, match=rule):
        jax_live.branch({"w": normal(7, 5)}, adapter, **settings)


def test_a_square_leaf_of_no_known_name_needs_a_word():
    pair = Lora(normal(2, 7), normal(7, 2), 3.0, "alpha/r")
    adapter = Adapter({"gate": Update((pair,))}, names="flax")
    with pytest.raises(LoraFormatError, match="LF-604"):
        jax_live.branch({"gate": normal(7, 7)}, adapter)
    branched = jax_live.branch({"gate": jnp.zeros((7, 7))}, adapter, axes={"gate": "in,out"})
    wanted = X @ (1.5 * pair.lora_B @ pair.lora_A).T
    assert relative_error(np.asarray(branched(lambda p, x: x @ p["gate"], X)), wanted) < 2e-6


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_codes_whose_scales_lie_elsewhere_are_not_merged_into(dtype):
    with pytest.raises(LoraFormatError, match="LF-608"):
        jax_live.apply({"w": jnp.ones((7, 5), dtype)}, Adapter({"w": lora(LINEAR)}, names="flax"))


def test_a_leaf_without_values_is_branched_and_not_merged():
    params, adapter = {"w": normal(7, 5)}, Adapter({"w": lora(LINEAR)}, names="flax")
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((7, 5))})
    with pytest.raises(LoraFormatError, match=r"LF-608.*has no values"):
        jax_live.apply(shapes, adapter)
    traced = jax.eval_shape(lambda b, x: b(lambda p, x: x @ p["w"], x), jax_live.branch(params, adapter), X)
    assert traced.shape == (3, 4, 5)


def test_two_leaves_of_one_path_are_refused():
    params = {"a/w": normal(7, 5), "a": {"w": normal(7, 5)}}
    for way in (jax_live.apply, jax_live.branch):
        with pytest.raises(LoraFormatError, match="LF-603"):
            way(params, Adapter({"a/w": lora(LINEAR)}, names="flax"))
