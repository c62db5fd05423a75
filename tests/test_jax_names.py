"""Gemma, MaxText and transformers' Flax models: torch's names there and back, and what lies otherwise there with them."""

import json

import numpy as np
import pytest
from jax_goldens import GEMMA, GOLDEN, MAXTEXT, SCANNED, base_of, check_merged, config_of, expected, scanned
from safetensors.numpy import save_file

import loraformat as lf
from loraformat import Adapter, Lora, LoraFormatError, Replace, Update
from loraformat.axes import Placement
from loraformat.base import Parameter
from loraformat.testing import relative_error
from loraformat.verbs.retarget import retarget

DRAW = np.random.default_rng(21)
D, N, K, H, F = 10, 6, 3, 4, 14
SIZES = {"hidden_size": D, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H, "intermediate_size": F}
LAYER = "model.layers.3"


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def pair(out, in_, rank=2, placed=True):
    place = Placement((out, in_), (0,), (1,)) if placed else None
    return Update((Lora(normal(rank, in_), normal(out, rank), 3.0, "alpha/r"),), place)


class Base:
    """A model whose parameters are called so; of its values nobody asks."""

    verbs = frozenset({"merge"})

    def __init__(self, shapes, names="flax"):
        self.shapes, self.names = shapes, names

    def parameters(self):
        return {name: Parameter(name, shape, "F32") for name, shape in self.shapes.items()}

    def describe(self):
        return {}


def torch_gemma(kv=K, placed=True):
    shapes = {"q": (N * H, D), "k": (kv * H, D), "v": (kv * H, D), "o": (D, N * H)}
    found = {f"{LAYER}.self_attn.{name}_proj.weight": pair(*shape, placed=placed) for name, shape in shapes.items()}
    mlp = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    return Adapter(
        found | {f"{LAYER}.mlp.{name}_proj.weight": pair(*shape, placed=placed) for name, shape in mlp.items()}
    )


def kernels(adapter, kv=K, transposed=True):
    """ΔW as gemma's einsums hold it: heads in front, k with v, the gate with its input (gm/nn/_modules.py)."""
    delta = {key.split(".")[-2][:-5]: update.matrix() for key, update in adapter.items()}
    q, k, v = (delta[name].reshape(-1, H, D).swapaxes(1, 2) for name in "qkv")
    gate, up = (delta[name] if transposed else delta[name].T for name in ("gate", "up"))
    found = (
        {"attn/q_einsum/w": q, "attn/kv_einsum/w": np.stack([k, v])}
        if kv != N
        else {"attn/qkv_einsum/w": np.stack([q, k, v])}
    )
    return found | {
        "attn/attn_vec_einsum/w": delta["o"].T.reshape(N, H, D),
        "mlp/gating_einsum": np.stack([gate, up]),
        "mlp/linear": delta["down"].T,
    }


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize(("kv", "transposed"), [(K, True), (K, False), (N, True)])
def test_a_gemma_of_torch_is_deepminds_and_back(kv, transposed, placed):
    adapter = torch_gemma(kv, placed)
    want = {f"layer_3/{name}": value for name, value in kernels(adapter, kv, transposed).items()}
    base = Base({name: value.shape for name, value in want.items()})
    there = retarget(
        adapter, base=base, config=SIZES | {"num_key_value_heads": kv, "model_type": "gemma3_text"}
    ).adapter
    assert sorted(there) == sorted(want)
    for name, value in want.items():
        assert there[name].placement.shape == value.shape, name
        assert relative_error(there[name].delta(), value) < 1e-6, name
    back = retarget(there, "torch", config={"model_type": "gemma3_text"}).adapter
    assert sorted(back) == sorted(adapter)
    for key, update in adapter.items():
        assert relative_error(back[key].matrix(), update.matrix()) < 1e-6, key
        assert back[key].placement == Placement(update.matrix_shape(), (0,), (1,)), key


def test_tunix_has_gemmas_einsums_and_an_mlp_of_its_own():
    """tunix models/gemma3/params_safetensors.py: layers/#, and gate_proj, up_proj, down_proj as kernels."""
    adapter = torch_gemma()
    own = {f"layers/3/{name}": value for name, value in kernels(adapter).items() if "mlp" not in name}
    own |= {
        f"layers/3/mlp/{n}_proj/kernel": adapter[f"{LAYER}.mlp.{n}_proj.weight"].matrix().T
        for n in ("gate", "up", "down")
    }
    there = retarget(adapter, base=Base({name: value.shape for name, value in own.items()}), config=SIZES).adapter
    assert sorted(there) == sorted(own)
    for name, value in own.items():
        assert relative_error(there[name].delta(), value) < 1e-6, name
    back = retarget(there, "torch").adapter
    for key, update in adapter.items():
        assert relative_error(back[key].matrix(), update.matrix()) < 1e-6, key


@pytest.mark.parametrize("home", ["model.language_model.", "language_model.model."])
def test_the_language_model_of_a_gemma_with_pictures_is_where_transformers_has_it(home):
    key = f"{home}layers.3.self_attn.q_proj.weight"
    adapter, own = Adapter({key: pair(N * H, D)}), "layer_3/attn/q_einsum/w"
    config = {"model_type": "gemma3", "text_config": SIZES | {"model_type": "gemma3_text"}}
    there = retarget(adapter, base=Base({own: (N, D, H)}), config=config).adapter
    assert list(there) == [own]
    back = retarget(there, base=Base({key: (N * H, D)}, "torch"), config=config).adapter
    assert relative_error(back[key].matrix(), adapter[key].matrix()) < 1e-6
    alone = retarget(there, "torch", config=config).adapter
    assert list(alone) == ["model.language_model.layers.3.self_attn.q_proj.weight"]


def test_a_key_alone_is_half_of_gemmas_einsum():
    only = {f"{LAYER}.self_attn.k_proj.weight": pair(K * H, D)}
    base = Base({"layer_3/attn/kv_einsum/w": (2, K, D, H)})
    there = retarget(Adapter(only), base=base, config=SIZES).adapter["layer_3/attn/kv_einsum/w"]
    assert there.rank == 2
    assert not there.delta()[1].any()
    assert there.delta()[0].any()


def test_a_norm_of_gemma_is_the_same_vector():
    adapter = Adapter({"model.norm.weight": Update((Replace(normal(D)),))})
    there = retarget(adapter, base=Base({"final_norm/scale": (D,)})).adapter
    assert np.array_equal(there["final_norm/scale"]["replace"].replace, adapter["model.norm.weight"]["replace"].replace)


def test_what_gemma_trained_goes_to_torch_and_back_into_its_own_shapes(tmp_path):
    """The golden of gemma itself, through torch's names: fused factors stay apart, ranks add up, ΔW is the same."""
    base = base_of(GEMMA / "gqa", tmp_path)
    adapter = lf.load(GEMMA / "gqa" / "lora.msgpack", base=base)
    torch = retarget(adapter, "torch", config={"model_type": "gemma3_text"}).adapter
    assert "model.layers.0.self_attn.k_proj.weight" in torch
    assert "model.layers.0.mlp.up_proj.weight" in torch
    again = retarget(torch, base=base, config={"model_type": "gemma3_text"}).adapter
    assert sorted(again) == sorted(adapter)
    for key, update in adapter.items():
        assert relative_error(again[key].delta(), update.delta()) < 1e-6, key


# MaxText


@pytest.mark.parametrize("case", SCANNED)
def test_maxtexts_scanned_kernels_are_the_layers_of_torch(case, tmp_path):
    """There and back against MaxText's own converter: order of rows, scale of the query, layers in either axis."""
    factors = dict(np.load(MAXTEXT / case / "peft.npz"))
    config, scale = config_of(case), 2.0
    peft = {}
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            part = Lora(a, factors[f"{stem}.lora_B.weight"], scale, "factor")
            peft[f"{stem.removeprefix('base_model.model.')}.weight"] = Update((part,))
    base = base_of(MAXTEXT / case, tmp_path)
    found = retarget(scanned(case, tmp_path, base), "torch", config=config).adapter
    assert sorted(found) == sorted(peft)
    for key, update in peft.items():
        assert relative_error(found[key].matrix(), update.matrix()) < 1e-6, key
    there = retarget(Adapter(peft), base=base, config=config)
    check_merged(there.adapter, MAXTEXT / case)
    assert sorted(there.adapter) == sorted(expected(MAXTEXT / case))


def test_the_command_line_leads_from_maxtext_to_peft_and_back(run, tmp_path):
    """The base is MaxText's checkpoint, with the model's config.json beside it."""
    (tmp_path / "model").mkdir()
    np.savez(tmp_path / "model" / "weights.npz", **{k: case["W"] for k, case in expected(MAXTEXT / "llama-1").items()})
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_of("llama-1")))
    base = ("--base", "model/weights.npz")
    told = run("convert", MAXTEXT / "llama-1" / "lora.npz", "peft", "--to", "peft", "--alpha", "6", *base)
    assert told.code == 0, told.err
    factors = np.load(MAXTEXT / "llama-1" / "peft.npz")
    for key, update in lf.load(tmp_path / "peft").items():
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        wanted = 2.0 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        assert relative_error(update.matrix(), wanted) < 1e-6, key
    told = run("retarget", "peft", *base, "-o", "back.lora.safetensors")
    assert told.code == 0, told.err
    check_merged(lf.load(tmp_path / "back.lora.safetensors"), MAXTEXT / "llama-1")
    told = run("merge", "back.lora.safetensors", "--into", "model/weights.npz", "-o", "merged.npz", "--verify")
    assert told.code == 0, told.err


def test_the_command_line_leads_from_gemma_to_peft_and_back(run, tmp_path):
    base = ("--base", GEMMA / "gqa" / "base.npz")
    told = run("convert", GEMMA / "gqa" / "lora.msgpack", "peft", "--to", "peft", *base)
    assert told.code == 0, told.err
    told = run("convert", "peft", "again.msgpack", "--to", "gemma", *base)
    assert told.code == 0, told.err
    one, other = (lf.load(path) for path in (GEMMA / "gqa" / "lora.msgpack", tmp_path / "again.msgpack"))
    assert sorted(one) == sorted(other)
    for key, update in one.items():
        assert relative_error(other[key].matrix(), update.matrix()) < 1e-6, key


def test_maxtexts_query_is_refused_where_the_model_is_not_known(tmp_path):
    base = base_of(MAXTEXT / "llama-1", tmp_path)
    adapter = scanned("llama-1", tmp_path, base)
    with pytest.raises(LoraFormatError, match="LF-604") as caught:
        retarget(adapter, "torch")
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(("model", "own", "layers"), [("gemma2", "decoder/layers_1/self_attention_global", 3), ("qwen3", "decoder/layers_3/self_attention", 3)])  # fmt: skip
def test_maxtexts_layers_apart(model, own, layers):
    """Gemma 2 holds two layers in a block: the local of block i is layer 2i, the global 2i + 1."""
    key = f"model.layers.{layers}.self_attn.o_proj.weight"
    adapter = Adapter({key: pair(D, N * H)})
    there = retarget(adapter, base=Base({f"{own}/out/kernel": (N, H, D)}), config=SIZES | {"model_type": model}).adapter
    assert relative_error(there[f"{own}/out/kernel"].delta(), adapter[key].matrix().T.reshape(N, H, D)) < 1e-6
    back = retarget(there, "torch", config={"model_type": model}).adapter
    assert relative_error(back[key].matrix(), adapter[key].matrix()) < 1e-6


def test_a_gemma3_of_maxtext_is_scanned_in_blocks_of_six_and_what_is_left_over_is_apart():
    """GEMMA3_MAXTEXT_TO_HF_PARAM_MAPPING: of 14 layers the blocks hold b and b + 6, the rest 12 and 13."""
    config = SIZES | {"model_type": "gemma3_text", "num_hidden_layers": 14}
    adapter = Adapter({f"model.layers.{n}.mlp.down_proj.weight": pair(D, F) for n in (3, 9, 13)})
    own = {
        "decoder/layers/layers_3/mlp/wo/kernel": (F, 2, D),
        "decoder/layers_remainder/layers_0/mlp/wo/kernel": (F, D),
    }
    own["decoder/layers_remainder/layers_1/mlp/wo/kernel"] = (F, D)
    there = retarget(adapter, base=Base(own), config=config).adapter
    assert sorted(there) == ["decoder/layers/layers_3/mlp/wo/kernel", "decoder/layers_remainder/layers_1/mlp/wo/kernel"]
    delta = {key.split(".")[2]: update.matrix().T for key, update in adapter.items()}
    assert (
        relative_error(there["decoder/layers/layers_3/mlp/wo/kernel"].delta(), np.stack([delta["3"], delta["9"]], 1))
        < 1e-6
    )
    assert relative_error(there["decoder/layers_remainder/layers_1/mlp/wo/kernel"].delta(), delta["13"]) < 1e-6
    back = retarget(there, "torch", config=config).adapter
    assert sorted(back) == sorted(adapter)
    for key, update in adapter.items():
        assert relative_error(back[key].matrix(), update.matrix()) < 1e-6, key


def test_a_mistral_of_maxtext_has_its_query_scaled_and_in_order():
    key, own = "model.layers.0.self_attn.q_proj.weight", "decoder/layers_0/self_attention/query/kernel"
    adapter = Adapter({key: pair(N * H, D)})
    config = SIZES | {"model_type": "mistral"}
    there = retarget(adapter, base=Base({own: (D, N, H)}), config=config).adapter
    assert relative_error(there[own].delta(), adapter[key].matrix().T.reshape(D, N, H) / 2.0) < 1e-6  # √4
    assert relative_error(retarget(there, "torch", config=config).adapter[key].matrix(), adapter[key].matrix()) < 1e-6


# By values alone


def by_value(tmp_path):
    """A model of torch, and the same weights in JAX under names that nobody knows: heads, a stack in either axis."""
    draw = np.random.default_rng(31)
    torch = {f"net.{i}.{name}.weight": draw.standard_normal(shape).astype(np.float32)
             for i in range(3) for name, shape in (("q", (24, 10)), ("o", (10, 24)), ("up", (14, 10)))}  # fmt: skip
    torch["net.head.weight"] = draw.standard_normal((17, 10)).astype(np.float32)
    layers = {name: [torch[f"net.{i}.{name}.weight"].T for i in range(3)] for name in ("q", "o", "up")}
    flax = {
        "b/alpha": np.stack(layers["q"], 1).reshape(10, 3, 6, 4),
        "b/beta": np.stack([w.reshape(6, 4, 10) for w in layers["o"]]),
        **{f"b/gamma_{i}": w for i, w in enumerate(layers["up"])},
        "c/delta": torch["net.head.weight"],
        "c/other": draw.standard_normal((14, 10)).astype(np.float32),
    }
    save_file(torch, tmp_path / "torch.safetensors")
    np.savez(tmp_path / "flax.npz", **flax)
    return torch, lf.open_base(tmp_path / "torch.safetensors"), lf.open_base(tmp_path / "flax.npz")


def test_renamed_transposed_stacked_and_head_split_weights_are_found_by_value(tmp_path):
    weights, torch, flax = by_value(tmp_path)
    adapter = Adapter({key: pair(*weight.shape) for key, weight in weights.items()})
    there = retarget(adapter, base=flax, origin=torch)
    assert sorted(there.adapter) == ["b/alpha", "b/beta", "b/gamma_0", "b/gamma_1", "b/gamma_2", "c/delta"]
    assert all(evidence.startswith("sketch") for evidence in there.evidence)
    delta = {key: update.matrix() for key, update in adapter.items()}
    layers = [
        np.stack([delta[f"net.{i}.{name}.weight"].T for i in range(3)], axis) for name, axis in (("q", 1), ("o", 0))
    ]
    for key, wanted in zip(("b/alpha", "b/beta"), layers, strict=True):
        found = there.adapter[key].delta()
        assert relative_error(found, wanted.reshape(found.shape)) < 1e-6, key
    assert relative_error(there.adapter["b/gamma_2"].delta(), delta["net.2.up.weight"].T) < 1e-6
    assert relative_error(there.adapter["c/delta"].delta(), delta["net.head.weight"]) < 1e-6
    back = retarget(there.adapter, base=torch, origin=flax).adapter
    assert sorted(back) == sorted(adapter)
    for key, wanted in delta.items():
        assert relative_error(back[key].matrix(), wanted) < 1e-6, key


def test_which_of_two_tied_weights_is_meant_the_names_tell(tmp_path):
    draw = np.random.default_rng(41)
    table, up = draw.standard_normal((17, 10)).astype(np.float32), draw.standard_normal((14, 10)).astype(np.float32)
    save_file(
        {"model.embed_tokens.weight": table, "lm_head.weight": table, "x.y.weight": up}, tmp_path / "t.safetensors"
    )
    np.savez(tmp_path / "f.npz", **{"embedder/input_embedding": table, "odd": up.T})
    flax, torch = lf.open_base(tmp_path / "f.npz"), lf.open_base(tmp_path / "t.safetensors")
    targets = {"embedder/input_embedding": Placement((17, 10), (1,), (0,)), "odd": Placement((10, 14), (1,), (0,))}
    parts = {
        key: Lora(normal(2, p.matrix_shape[1]), normal(p.matrix_shape[0], 2), 1.0, "factor")
        for key, p in targets.items()
    }
    adapter = Adapter({key: Update((parts[key],), place) for key, place in targets.items()}, names="flax")
    found = retarget(adapter, base=torch, origin=flax)
    assert found.matched == {"embedder/input_embedding": ("model.embed_tokens.weight",), "odd": ("x.y.weight",)}
    assert relative_error(found.adapter["x.y.weight"].delta(), adapter["odd"].delta().T) < 1e-6


def test_a_weight_that_the_other_base_has_not_is_refused(tmp_path):
    weights, torch, flax = by_value(tmp_path)
    np.savez(
        tmp_path / "less.npz", **{name: np.asarray(flax.read(name)) for name in flax.parameters() if name != "c/delta"}
    )
    adapter = Adapter({key: pair(*weight.shape) for key, weight in weights.items()})
    with pytest.raises(LoraFormatError, match="LF-602"):
        retarget(adapter, base=lf.open_base(tmp_path / "less.npz"), origin=torch)


# transformers' own Flax models, up to version 4


FAMILIES = json.loads((GOLDEN / "flax_names" / "names.json").read_text())


def torch_update(name, shape):
    if len(shape) == 1 or not name.endswith(".weight"):
        return Update((Replace(normal(*shape)),))
    if ("embeddings." in name and len(shape) == 2) or "embed_tokens" in name:
        part = Lora(normal(2, shape[0]), normal(shape[1], 2), 3.0, "alpha/r")
        return Update((part,), Placement(tuple(shape), (1,), (0,)), op="embedding")
    in_ = int(np.prod(shape[1:]))
    part = Lora(normal(2, in_), normal(shape[0], 2), 3.0, "alpha/r")
    return Update((part,), Placement(tuple(shape), (0,), tuple(range(1, len(shape)))))


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_every_parameter_of_a_flax_model_is_found_and_lies_as_it_does_there(model):
    """names.json: the parameters of both models by transformers itself, and which is which by its own converter."""
    known = FAMILIES[model]
    torch = {name: torch_update(name, shape) for name, shape in known["torch"].items() if name in known["pairs"]}
    base = Base({name: tuple(shape) for name, shape in known["flax"].items()})
    found = retarget(Adapter(torch), base=base)
    assert found.matched == {key: (own,) for key, own in known["pairs"].items()}
    for own in known["pairs"].values():
        update = found.adapter[own]
        assert tuple(known["flax"][own]) == (
            update.placement.shape if update.placement else update["replace"].replace.shape
        )
    back = retarget(found.adapter, base=Base({name: tuple(shape) for name, shape in known["torch"].items()}, "torch"))
    assert sorted(back.adapter) == sorted(torch)
