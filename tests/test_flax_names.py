"""PyTorch ↔ JAX: the same change under the names of flax and Tunix, in kernels that lie as theirs do."""

import numpy as np
import pytest
from safetensors import safe_open

import loraformat as lf
from loraformat import Adapter, Lora, LoraFormatError, Magnitude, Replace, Update
from loraformat.axes import Placement
from loraformat.base import Parameter
from loraformat.testing import relative_error
from loraformat.verbs.retarget import retarget

DRAW = np.random.default_rng(4)
EMBED, HEADS, KV, SIZE, INNER = 10, 4, 2, 3, 14
CONFIG = {"hidden_size": EMBED, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": SIZE}


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def linear(out, in_, *more):
    return Update((Lora(normal(2, in_), normal(out, 2), 3.0, "alpha/r"), *more), Placement((out, in_), (0,), (1,)))


LLAMA = {
    "model.layers.3.self_attn.q_proj.weight": ("layers/3/attn/q_proj/w", HEADS * SIZE, EMBED, (EMBED, HEADS, SIZE)),
    "model.layers.3.self_attn.v_proj.weight": ("layers/3/attn/v_proj/w", KV * SIZE, EMBED, (EMBED, KV, SIZE)),
    "model.layers.3.self_attn.o_proj.weight": ("layers/3/attn/o_proj/w", EMBED, HEADS * SIZE, (HEADS, SIZE, EMBED)),
    "model.layers.3.mlp.up_proj.weight": ("layers/3/mlp/up_proj/kernel", INNER, EMBED, (EMBED, INNER)),
    "lm_head.weight": ("lm_head/w", 17, EMBED, (EMBED, 17)),
}


def llama():
    return Adapter({key: linear(out, in_) for key, (_, out, in_, _) in LLAMA.items()})


class Base:
    """A model whose parameters are called so; of its values nobody asks."""

    verbs = frozenset({"merge"})

    def __init__(self, shapes, names="flax"):
        self.shapes, self.names = shapes, names

    def parameters(self):
        return {name: Parameter(name, shape, "F32") for name, shape in self.shapes.items()}

    def describe(self):
        return {}


TUNIX = Base({own: shape for own, _, _, shape in LLAMA.values()})


def test_a_llama_goes_to_tunix_by_heads_and_back():
    """tunix's own loader: W.transpose((1, 0)).reshape(shape)."""
    adapter = llama()
    there = retarget(adapter, base=TUNIX, config=CONFIG).adapter
    assert there.names == "flax"
    assert sorted(there) == sorted(own for own, *_ in LLAMA.values())
    for key, (own, _, _, shape) in LLAMA.items():
        assert there[own].placement.shape == shape
        assert relative_error(there[own].delta(), adapter[key].delta().T.reshape(shape)) < 1e-6
    back = retarget(there, "torch", config=CONFIG).adapter
    for key, update in adapter.items():
        assert relative_error(back[key].delta(), update.delta()) < 1e-6


def test_dora_keeps_its_rows():
    update = linear(HEADS * SIZE, EMBED, Magnitude(np.abs(normal(HEADS * SIZE))))
    key = "model.layers.3.self_attn.q_proj.weight"
    weight = normal(HEADS * SIZE, EMBED)
    there = retarget(Adapter({key: update}), base=TUNIX, config=CONFIG).adapter["layers/3/attn/q_proj/w"]
    shape = (EMBED, HEADS, SIZE)
    assert relative_error(there.apply(weight.T.reshape(shape)), update.apply(weight).T.reshape(shape)) < 1e-6


LINEN = {
    "encoder.layer.0.attention.self.query.weight": ("encoder/layer/0/attention/self/query/kernel", linear(7, 5)),
    "embeddings.word_embeddings.weight": (
        "embeddings/word_embeddings/embedding",
        Update((Lora(normal(2, 11), normal(5, 2), 3.0, "alpha/r"),), Placement((11, 5), (1,), (0,)), op="embedding"),
    ),
    "conv.weight": (
        "conv/kernel",
        Update((Lora(normal(2, 5 * 6), normal(7, 2), 3.0, "alpha/r"),), Placement((7, 5, 3, 2), (0,), (1, 2, 3))),
    ),
    "norm.weight": ("norm/scale", Update((Replace(normal(7)),))),
    "norm.bias": ("norm/bias", Update((Replace(normal(7)),))),
}


def test_linens_rule_by_what_a_parameter_is():
    adapter = Adapter({key: update for key, (_, update) in LINEN.items()})
    there = retarget(adapter, "flax").adapter
    assert sorted(there) == sorted(own for own, _ in LINEN.values())
    query, embed, conv = (LINEN[key][1] for key in list(LINEN)[:3])
    assert relative_error(there["encoder/layer/0/attention/self/query/kernel"].delta(), query.delta().T) < 1e-6
    assert relative_error(there["embeddings/word_embeddings/embedding"].delta(), embed.delta()) < 1e-6
    assert relative_error(there["conv/kernel"].delta(), conv.delta().transpose(2, 3, 1, 0)) < 1e-6
    back = retarget(there, "torch").adapter
    for key, update in adapter.items():
        if update.additive:
            assert relative_error(back[key].delta(), update.delta()) < 1e-6
        else:
            assert np.array_equal(back[key]["replace"].replace, update["replace"].replace)


def test_a_layer_that_both_know_is_refused_until_something_tells():
    adapter = Adapter({"model.layers.3.mlp.up_proj.weight": linear(INNER, EMBED)})
    with pytest.raises(LoraFormatError, match="LF-603"):
        retarget(adapter, "flax")
    assert list(retarget(adapter, base=TUNIX).adapter) == ["layers/3/mlp/up_proj/kernel"]
    linen = Base({"model/layers/3/mlp/up_proj/kernel": (EMBED, INNER)})
    assert list(retarget(adapter, base=linen).adapter) == ["model/layers/3/mlp/up_proj/kernel"]
    torch = Base({"layers.3.mlp.up_proj.weight": (INNER, EMBED)}, "torch")
    own = Adapter(
        {"layers/3/mlp/up_proj/kernel": Update((Lora(normal(2, EMBED), normal(INNER, 2), 1.0, "factor"),))},
        names="flax",
    )
    assert list(retarget(own, base=torch).adapter) == ["layers.3.mlp.up_proj.weight"]
    with pytest.raises(LoraFormatError, match="LF-603"):
        retarget(own, "torch")


def test_a_name_that_nobody_knows_is_refused():
    with pytest.raises(LoraFormatError, match="LF-602"):
        retarget(Adapter({"odd/w": Update((Lora(normal(2, 5), normal(7, 2), 1.0, "factor"),))}, names="flax"), "torch")


@pytest.mark.parametrize(
    ("own", "torch"),
    [("bert/embeddings/word_embeddings/embedding", "bert.embeddings.word_embeddings.weight"),
     ("embedder/input_embedding", "model.embed_tokens.weight")],
)  # fmt: skip
def test_what_is_looked_up_is_an_embedding_to_peft_too(own, torch, tmp_path):
    table = Update((Lora(normal(2, 17), normal(EMBED, 2), 3.0, "alpha/r"),), Placement((17, EMBED), (1,), (0,)))
    made = retarget(Adapter({own: table}, names="flax"), "torch", config={**CONFIG, "model_type": "gemma2"}).adapter
    assert {key: update.op for key, update in made.items()} == {torch: "embedding"}
    assert relative_error(made[torch].matrix(), table.matrix()) <= 1e-6
    lf.save(made, tmp_path / "a.safetensors")
    lf.convert(tmp_path / "a.safetensors", tmp_path / "peft", to_layout="peft")
    with safe_open(tmp_path / "peft/adapter_model.safetensors", "numpy") as file:
        assert {key.rpartition(".")[2] for key in file.keys()} == {"lora_embedding_A", "lora_embedding_B"}  # noqa: SIM118
