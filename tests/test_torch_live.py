"""Adapters on plain live modules: what is computed, switched, summed, trained, and taken off again."""

import copy
import functools

import numpy as np
import pytest

import loraformat as lf
from loraformat import testing
from loraformat.axes import Placement
from loraformat.parts import Delta, Lora, Magnitude, Replace, Rows
from loraformat.strength import strengthen
from loraformat.updates import Update

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch", reason="live modules are torch's: pip install 'loraformat[peers]'")

from torch import nn  # noqa: E402

from loraformat_converters import torch_live  # noqa: E402
from loraformat_converters.torch_live.factors import UpdateModule  # noqa: E402
from loraformat_converters.torch_live.tensors import to_numpy, to_torch  # noqa: E402

DRAW = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(3)


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def pair(out, in_, r=3, alpha=4.5):
    return Update((Lora(normal(r, in_), normal(out, r), alpha, "alpha/r"),))


def adapter(**targets):
    return lf.Adapter({name.replace("__", "."): update for name, update in targets.items()})


def net(*layers, **named):
    return nn.Sequential(*layers) if layers else nn.ModuleDict(named)


@torch.no_grad()
def merged_by_hand(module, adapters):
    """The module with the weights that loraformat's own arithmetic gives."""
    other = copy.deepcopy(module)
    base = torch_live.ModuleBase(module)
    for one in adapters:
        for key, places in base.resolve(one, lf.Hints()).require().targets.items():
            for match in places:
                path, _, leaf = match.weight.rpartition(".")
                parameter = getattr(other.get_submodule(path), leaf)
                parameter.data = to_torch(match.turned(one[key]).apply(to_numpy(parameter)))
    return other


def close(found, wanted, tolerance=1e-6):
    return testing.relative_error(found.detach().numpy(), wanted.detach().numpy()) <= tolerance


def frozen(module):
    """Everything that must be as it was: tensors and their identity, order, hooks, attributes, class."""
    return [_frozen(name, inner) for name, inner in module.named_modules()]


def _frozen(name, m):
    tensors = [t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    values = [(id(t), t.detach().clone().numpy().tobytes()) for t in tensors]
    return name, type(m), list(m.__dict__), list(m._parameters), list(m._buffers), list(m._modules), len(m._forward_hooks), values  # fmt: skip


# Arithmetic.


@pytest.mark.parametrize("kind", testing.KINDS)
def test_every_kind_is_computed_as_loraformat_computes_it(kind):
    ((_, update),) = testing.random_adapter(2, (kind,)).items()
    if update.placement is None:
        shape = update.matrix_shape() or (6, 9)
        update = update.placed(Placement(shape, (0,), (1,)))
    weight = normal(*update.placement.shape)
    found = UpdateModule(update, False)(torch.from_numpy(weight.copy()))
    assert testing.relative_error(found.numpy(), update.apply(weight)) <= 1e-6


def test_a_core_and_products_of_lokr_are_computed_as_loraformat_computes_them():
    place = Placement((6, 10, 3, 2), (0,), (1, 2, 3))
    mid = Update((Lora(normal(3, 10), normal(6, 3), 2.0, "factor", mid=normal(3, 3, 3, 2)),), place)
    loha = Update((lf.Loha(normal(4, 6), normal(4, 10), normal(4, 6), normal(4, 10), 3, "alpha/r", normal(4, 4, 3, 2), normal(4, 4, 3, 2)),), place)  # fmt: skip
    lokr = Update((lf.Lokr(0.7, "factor", lokr_w1_a=normal(2, 4), lokr_w1_b=normal(4, 5), lokr_w2_a=normal(4, 3), lokr_w2_b=normal(4, 2), t2=normal(4, 4, 3, 2)),), place)  # fmt: skip
    for update in (mid, loha, lokr):
        weight = normal(*place.shape)
        found = UpdateModule(update, False)(torch.from_numpy(weight.copy()))
        assert testing.relative_error(found.numpy(), update.apply(weight)) <= 1e-6


def test_magnitudes_over_other_axes_and_with_eps():
    place = Placement((17, 6), (1,), (0,))
    update = Update((Lora(normal(4, 17), normal(6, 4), 3, "alpha/r"), Magnitude(abs(normal(17)), (0,), 1e-3)), place)
    weight = normal(17, 6)
    found = UpdateModule(update, False)(torch.from_numpy(weight.copy()))
    assert testing.relative_error(found.numpy(), update.apply(weight)) <= 1e-6


@pytest.mark.parametrize("word", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "int64"])
def test_a_tensor_goes_to_numpy_and_back_bit_for_bit(word):
    tensor = (torch.randn(3, 5) * 9).to(getattr(torch, word))
    again = to_torch(to_numpy(tensor))
    assert again.dtype == tensor.dtype
    assert np.array_equal(to_numpy(again), to_numpy(tensor))


# Modules whose class runs a branch beside them.

MODULES = {
    "linear": (lambda: nn.Linear(7, 11), (11, 7), (2, 5, 7)),
    "conv1d": (lambda: nn.Conv1d(5, 8, 3, stride=2, padding=1), (8, 15), (2, 5, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, bias=False), (6, 24), (2, 4, 9, 8)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (6, 36), (2, 4, 7, 8)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (6, 36), (4, 7, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (6, 18), (2, 4, 7, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (8, 9), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), (5, 16), (2, 2, 3, 4, 5)),
    "embedding": (lambda: nn.Embedding(17, 6, padding_idx=3), (6, 17), None),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_pair_beside_a_module_is_the_merged_module(name):
    make, (out, in_), sizes = MODULES[name]
    model = nn.Sequential(make())
    x = torch.randn(sizes) if sizes else torch.randint(0, 17, (3, 5))
    one = adapter(**{"0__weight": pair(out, in_)})
    before, base = frozen(model), model(x)
    wanted, weaker = (merged_by_hand(model, [strengthen(one, weight)])(x) for weight in (1.0, -0.3))
    handle = torch_live.apply(one, model)
    assert len(model[0]._forward_hooks) == 1  # beside it, and not by a changed weight
    assert close(model(x), wanted, 2e-6)
    handle.weight = -0.3
    assert close(model(x), weaker, 2e-6)
    assert not close(base, wanted, 1e-2)
    handle.enabled = False
    assert torch.equal(model(x), base)
    handle.remove()
    assert frozen(model) == before
    assert torch.equal(model(x), base)


def test_an_input_may_come_by_its_name():
    model = net(proj=nn.Linear(7, 11))
    x = torch.randn(2, 7)
    with torch_live.apply(adapter(proj__weight=pair(11, 7)), model):
        assert torch.equal(model["proj"](input=x), model["proj"](x))


class Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Reads(nn.Module):
    """Reads a weight by attribute and never calls the module."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("train", [True, False])
def test_modules_that_are_read_and_not_called_get_a_changed_weight(train):
    doubled, attention = nn.Sequential(Doubled(7, 11)).train(train), Reads().train(train)
    both = adapter(attn__in_proj_weight=pair(24, 8), attn__out_proj__weight=pair(8, 8, 2))
    limited = nn.Sequential(nn.Embedding(17, 6, max_norm=1.0))
    tried = (
        (doubled, adapter(**{"0__weight": pair(11, 7)}), torch.randn(2, 7)),
        (attention, both, torch.randn(2, 5, 8)),
        (limited, adapter(**{"0__weight": pair(6, 17)}), torch.randint(0, 17, (2, 4))),
    )
    for model, one, x in tried:
        before, wanted = frozen(model), merged_by_hand(model, [one])
        with torch.no_grad(), torch_live.apply(one, model):
            assert close(model(x), wanted(x))
        assert frozen(model) == before


def test_an_encoder_of_torch_takes_no_fast_path_past_the_branch():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    one = adapter(
        layers__0__linear1__weight=pair(12, 8), layers__1__self_attn__out_proj__weight=pair(8, 8, 2),
        layers__1__linear2__weight=pair(8, 12),
    )  # fmt: skip
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        wanted = merged_by_hand(model, [one])(x)
        with torch_live.apply(one, model):
            assert close(model(x), wanted, 2e-6)


# Strength, switches, several at once.


def two_kinds():
    """On a Linear 7 → 11: a pair; and a pair with a magnitude, for which the order counts."""
    plain_, dora = pair(11, 7), pair(11, 7, 2)
    return adapter(proj__weight=plain_), adapter(
        proj__weight=Update((*dora.parts, Magnitude(abs(normal(11)) + 1))), proj__bias=Update((Delta(normal(11), 0.5),))
    )


@pytest.mark.parametrize("modes", [("branch", "branch"), ("merge", "merge"), ("merge", "branch")])
def test_several_act_in_order_each_with_its_weight_and_its_switch(modes):
    model, x = net(proj=nn.Linear(7, 11)), torch.randn(4, 7)
    before = frozen(model)
    first, second = two_kinds()
    base = model["proj"](x)
    handles = [torch_live.apply(one, model, mode=mode) for one, mode in zip((first, second), modes, strict=True)]
    strong = functools.partial(strengthen, first)
    assert close(model["proj"](x), merged_by_hand(model_of(handles, model), [first, second])["proj"](x))
    handles[0].weight = -0.75
    assert close(model["proj"](x), merged_by_hand(model_of(handles, model), [strong(-0.75), second])["proj"](x))
    handles[1].enabled = False
    assert close(model["proj"](x), merged_by_hand(model_of(handles, model), [strong(-0.75)])["proj"](x))
    handles[0].enabled = False
    assert torch.equal(model["proj"](x), base)
    handles[1].enabled = True
    assert close(model["proj"](x), merged_by_hand(model_of(handles, model), [second])["proj"](x))
    handles[0].remove()
    assert close(model["proj"](x), merged_by_hand(model_of(handles, model), [second])["proj"](x))
    handles[1].remove()
    handles[1].remove()
    assert frozen(model) == before


def model_of(handles, model):
    """A copy of the model as it was before."""
    other = copy.deepcopy(model)
    other = net(proj=nn.Linear(7, 11))
    weights = {}
    for leaf in ("weight", "bias"):
        at = torch_live.ModuleBase(model).places[f"proj.{leaf}"]
        merged = model["proj"].__dict__.get("_loraformat_merged", {}).get(leaf)
        weights[f"proj.{leaf}"] = merged.original if merged else at.stored
    other.load_state_dict(weights)
    return other


def test_pairs_beside_one_another_add_up_and_go_in_any_order():
    model, x = net(proj=nn.Linear(7, 11)), torch.randn(4, 7)
    before = frozen(model)
    ones = [adapter(proj__weight=pair(11, 7, r)) for r in (2, 3, 5)]
    wanted = merged_by_hand(model, [ones[0], ones[2]])["proj"](x)
    handles = [torch_live.apply(one, model) for one in ones]
    handles[1].remove()
    assert close(model["proj"](x), wanted)
    handles[0].remove()
    handles[2].remove()
    assert frozen(model) == before


@pytest.mark.parametrize("mode", ["branch", "merge"])
def test_absolute_values_have_no_half(mode):
    model = net(proj=nn.Linear(7, 11))
    one = adapter(proj__bias=Update((Replace(normal(11)),)))
    handle = torch_live.apply(one, model, mode=mode)
    assert np.array_equal(to_numpy(model["proj"].bias), one["proj.bias"]["replace"].replace)
    with pytest.raises(lf.LoraFormatError, match="LF-612"):
        handle.weight = 0.5
    assert handle.weight == 1.0
    handle.remove()
    with pytest.raises(lf.LoraFormatError, match="LF-612"):
        torch_live.apply(one, model, mode=mode, weight=0.5)


def test_only_some_targets_and_each_with_a_scale():
    model = net(a=nn.Linear(7, 11), b=nn.Linear(7, 11))
    one = adapter(a__weight=pair(11, 7), b__weight=pair(11, 7))
    x = torch.randn(3, 7)
    base, wanted = model["b"](x), merged_by_hand(model, [strengthen(one, 2.0)])["a"](x)
    with torch_live.apply(one, model, only=["a"], scales={"a": 2.0}) as handle:
        assert handle.places == {"a.weight": ["a.weight"]}
        assert close(model["a"](x), wanted)
        assert torch.equal(model["b"](x), base)


# Tied weights, shared modules.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 6), nn.Linear(6, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("mode", ["branch", "merge"])
def test_a_change_of_one_of_two_tied_modules_is_of_that_one(mode):
    model, ids = Tied(), torch.randint(0, 17, (2, 4))
    before, one = frozen(model), adapter(head__weight=pair(17, 6))
    apart = copy.deepcopy(model)
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    wanted = merged_by_hand(apart, [one])(ids)
    with torch_live.apply(one, model, mode=mode) as handle:
        assert handle.places == {"head.weight": ["head.weight"]}
        assert close(model(ids), wanted)
    assert frozen(model) == before
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("mode", ["branch", "merge"])
def test_trained_tokens_are_those_of_every_module_that_shares_the_tensor(mode):
    model, ids = Tied(), torch.randint(0, 17, (2, 4))
    before = frozen(model)
    one = adapter(embed__weight=Update((Rows(normal(2, 6), np.array([1, 5])),)))
    with torch_live.apply(one, model, mode=mode) as handle:
        assert handle.places == {"embed.weight": ["embed.weight", "head.weight"]}
        for module in (model.embed, model.head):
            assert np.array_equal(to_numpy(module.weight)[[1, 5]], one["embed.weight"]["rows"].values)
        model(ids)
    assert frozen(model) == before


def test_a_module_at_two_paths_changes_once():
    shared = nn.Linear(7, 7)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    one, x = adapter(**{"2__weight": pair(7, 7)}), torch.randn(2, 7)
    wanted = merged_by_hand(model, [one])(x)
    with torch_live.apply(one, model):
        assert close(model(x), wanted)
    with pytest.raises(lf.LoraFormatError, match="LF-603"):
        torch_live.apply(adapter(**{"0__weight": pair(7, 7), "2__weight": pair(7, 7)}), model)


# Orientation and refusals.


def test_a_square_weight_lies_as_its_class_has_it():
    from transformers.pytorch_utils import Conv1D

    model = net(linear=nn.Linear(7, 7), conv1d=Conv1D(7, 7), embed=nn.Embedding(7, 7))
    one = adapter(linear__weight=pair(7, 7), conv1d__weight=pair(7, 7), embed__weight=pair(7, 7))
    with torch_live.apply(one, model, mode="merge"), torch.no_grad():
        x = torch.eye(7)
        for name, inputs in (("linear", x), ("conv1d", x), ("embed", torch.arange(7))):
            found = model[name](inputs)
            bias = getattr(model[name], "bias", None)
            found = found - bias if bias is not None else found
            weight = merged_by_hand(net(**{name: copy.deepcopy(model[name])}), [])[name].weight
            assert close(found, weight if name != "linear" else weight.T)
    bound = lf.bind(one, torch_live.ModuleBase(model))
    assert {key: update.placement.spec for key, update in bound.items()} == {
        "linear.weight": "out,in", "conv1d.weight": "in,out", "embed.weight": "in,out",
    }  # fmt: skip


def problems(call, *args, **kwargs):
    with pytest.raises(lf.LoraFormatError) as caught:
        call(*args, **kwargs)
    return {(problem.rule, problem.where) for problem in caught.value.problems}


def test_what_cannot_be_put_is_refused_with_every_reason_and_leaves_the_module_alone():
    model = net(proj=nn.Linear(7, 11), up=nn.ConvTranspose2d(4, 4, 3), rnn=nn.LSTM(7, 5))
    before = frozen(model)
    missing = adapter(prj__weight=pair(11, 7), proj__weight=pair(7, 11), up__weight=pair(4, 36))
    assert problems(torch_live.apply, missing, model) == {
        ("LF-602", "prj.weight"), ("LF-605", "proj.weight"), ("LF-604", "up.weight"),
    }  # fmt: skip
    assert problems(torch_live.apply, adapter(rnn__weight_ih_l0=pair(20, 7)), model) == {("LF-608", "rnn.weight_ih_l0")}
    assert problems(torch_live.apply, adapter(proj__weight=pair(11, 7)), model, hints=lf.Hints(names={"x": "y"})) == {("LF-705", "x")}  # fmt: skip
    head = adapter(head__weight=Update((Replace(normal(3, 7), ("add",)),)))
    assert problems(torch_live.apply, head, model) == {("LF-602", "head.weight")}
    grown = adapter(proj__weight=Update((Replace(normal(13, 7), ("resize",)),)))
    assert problems(torch_live.apply, grown, model) == {("LF-606", "proj.weight")}
    with torch.device("meta"):
        empty = net(proj=nn.Linear(7, 11))
    assert problems(torch_live.apply, adapter(proj__weight=pair(11, 7)), empty, mode="merge") == {("LF-608", "proj.weight")}  # fmt: skip
    assert problems(torch_live.apply, adapter(proj__weight=pair(11, 7)), model, mode="swap") == {("LF-705", "")}
    assert problems(torch_live.from_module, model) == {("LF-501", "")}
    assert frozen(model) == before


def test_a_merge_that_overflows_leaves_every_target_as_it_was():
    model = net(a=nn.Linear(7, 11), b=nn.Linear(7, 11)).half()
    before = frozen(model)
    one = adapter(a__weight=pair(11, 7), b__weight=pair(11, 7, alpha=1e9))
    with pytest.raises(lf.LoraFormatError, match="LF-611"):
        torch_live.apply(one, model, mode="merge")
    assert frozen(model) == before


def test_a_recurrent_weight_can_be_merged():
    model, x = net(rnn=nn.LSTM(7, 5)), torch.randn(3, 2, 7)
    base = model["rnn"](x)[0]
    before = frozen(model)
    handle = torch_live.apply(adapter(rnn__weight_ih_l0=pair(20, 7)), model, mode="merge")
    assert not close(model["rnn"](x)[0], base, 1e-3)
    handle.remove()
    assert torch.equal(model["rnn"](x)[0], base)
    assert [row[:3] for row in frozen(model)] == [row[:3] for row in before]


def test_names_that_differ_are_stated():
    model, x = net(proj=nn.Linear(7, 11)), torch.randn(2, 7)
    one = adapter(model__proj__weight=pair(11, 7))
    with torch_live.apply(one, model, hints=lf.Hints(names={"model.*": "*"})) as handle:
        assert handle.places == {"model.proj.weight": ["proj.weight"]}
        model["proj"](x)


def test_an_adapter_of_several_components_goes_on_a_pipeline():
    parts = {"unet": net(proj=nn.Linear(7, 11)), "text_encoder": net(proj=nn.Linear(7, 5)), "scheduler": object()}
    one = lf.Adapter(
        {"unet:proj.weight": pair(11, 7), "text_encoder:proj.weight": pair(5, 7)}, components=("text_encoder", "unet")
    )
    x, before = torch.randn(2, 7), [frozen(parts[name]) for name in ("unet", "text_encoder")]
    alone = {name: adapter(proj__weight=one[f"{name}:proj.weight"]) for name in ("unet", "text_encoder")}
    wanted = {name: merged_by_hand(parts[name], [alone[name]])["proj"](x) for name in alone}
    for mode in ("branch", "merge"):
        with torch_live.apply(one, parts, mode=mode):
            assert all(close(parts[name]["proj"](x), wanted[name]) for name in wanted)
        assert [frozen(parts[name]) for name in ("unet", "text_encoder")] == before
    assert problems(torch_live.apply, one, {"unet": parts["unet"]}) == {("LF-602", "text_encoder:proj.weight")}


# What a module does besides: moves, saves, copies, trains, compiles.


def test_a_merge_is_what_loraformat_writes_into_a_checkpoint_and_verify_agrees(tmp_path):
    from safetensors.torch import load_file, save_file

    model = net(proj=nn.Linear(7, 11), conv=nn.Conv2d(4, 6, 3)).bfloat16()
    one = adapter(proj__weight=pair(11, 7), conv__weight=pair(6, 36))
    plain = copy.deepcopy(model)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    lf.merge(one, lf.open_base(tmp_path / "base.safetensors"), tmp_path / "merged.safetensors")
    torch_live.apply(one, model, mode="merge")
    for name, tensor in load_file(tmp_path / "merged.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    verdict = lf.verify(torch_live.ModuleBase(plain), one, torch_live.ModuleBase(model))
    assert not verdict.problems
    assert verdict.untouched == 2


@pytest.mark.parametrize("mode", ["branch", "merge"])
def test_a_module_that_was_cast_meanwhile_is_what_it_would_be_without(mode):
    model = net(proj=nn.Linear(7, 11))
    other = copy.deepcopy(model).double()
    handle = torch_live.apply(adapter(proj__weight=pair(11, 7)), model, mode=mode)
    model.double()
    model["proj"](torch.randn(2, 7, dtype=torch.float64))
    handle.remove()
    assert frozen(model)[1][1] is nn.Linear
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


def test_half_precision_is_computed_in_the_wider_of_both_and_rounded_once():
    model, x = net(proj=nn.Linear(64, 48)).bfloat16(), torch.randn(5, 64).bfloat16()
    one = adapter(proj__weight=pair(48, 64, 16))
    exact = x.float() @ model["proj"].weight.float().T + model["proj"].bias.float()
    exact = exact.bfloat16().float() + x.float() @ torch.from_numpy(one["proj.weight"].matrix()).T
    with torch_live.apply(one, model):
        assert close(model["proj"](x).float(), exact.bfloat16().float(), 1e-4)


def test_somebody_who_wrote_into_a_merged_weight_is_told():
    model = net(proj=nn.Linear(7, 11))
    handle = torch_live.apply(adapter(proj__weight=pair(11, 7)), model, mode="merge")
    with torch.no_grad():
        model["proj"].weight.add_(1.0)
    for act in (handle.remove, functools.partial(setattr, handle, "weight", 0.5), functools.partial(setattr, handle, "enabled", False)):  # fmt: skip
        with pytest.raises(lf.LoraFormatError, match="LF-613"):
            act()


def test_a_branch_leaves_the_state_dict_alone_and_can_be_copied():
    model, x = net(proj=nn.Linear(7, 11)), torch.randn(2, 7)
    names, count = list(model.state_dict()), len(list(model.parameters()))
    handle = torch_live.apply(adapter(proj__weight=pair(11, 7)), model)
    assert list(model.state_dict()) == names
    assert len(list(model.parameters())) == count
    twin, strong = copy.deepcopy(model), model["proj"](x)
    handle.enabled = False
    assert torch.equal(twin["proj"](x), strong)  # its own switch
    handle.remove()
    assert torch.equal(twin["proj"](x), strong)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_flow_into_the_adapter_as_they_do_in_peft(kind):
    peft = pytest.importorskip("peft", reason="pip install 'loraformat[peers]'")
    model, x = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)), torch.randn(4, 7)
    model.requires_grad_(False)
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False, use_dora=kind == "dora")  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    start = torch_live.from_module(theirs)
    handle = torch_live.apply(start, model, trainable=True)
    sgd = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, theirs)]
    for _ in range(3):
        for optimizer, net_ in zip(sgd, (model, theirs), strict=True):
            optimizer.zero_grad()
            net_(x).square().sum().backward()
            optimizer.step()
    trained, wanted = handle.adapter, torch_live.from_module(theirs)
    for key, update in trained.items():
        for mine, other in zip(update.parts, wanted[key].parts, strict=True):
            for role in ("lora_A", "lora_B", "magnitude"):
                if hasattr(mine, role):
                    assert testing.relative_error(getattr(mine, role), getattr(other, role)) <= 2e-6
                    assert testing.relative_error(getattr(mine, role), getattr(start[key][mine.kind], role)) > 1e-3
    handle.remove()
    assert not any(p.requires_grad for p in model.parameters())
    assert handle.adapter[key].kind == kind


def test_what_is_merged_is_not_trained():
    model = net(proj=nn.Linear(7, 11))
    assert problems(torch_live.apply, adapter(proj__weight=pair(11, 7)), model, mode="merge", trainable=True) == {("LF-705", "")}  # fmt: skip


@pytest.mark.parametrize("mode", ["branch", "merge"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_under_torch_compile_everything_that_is_changed_meanwhile_is_seen(mode, kind):
    model, x = net(nn.Linear(7, 11)), torch.randn(4, 7)
    one = adapter(**{"0__weight": two_kinds()[kind == "dora"]["proj.weight"]})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    base = model(x)
    assert close(compiled(x), base)
    handle = torch_live.apply(one, model, mode=mode)
    for weight in (1.0, 0.5, -2.0):
        handle.weight = weight
        assert close(compiled(x), model(x))
        assert not close(compiled(x), base, 1e-3)
    handle.enabled = False
    assert close(compiled(x), base)
    handle.enabled = True
    assert close(compiled(x), model(x))
    handle.remove()
    assert close(compiled(x), base)


def test_a_weight_that_overflows_changes_nothing():
    model = net(a=nn.Linear(7, 11), b=nn.Linear(7, 11)).half()
    handle = torch_live.apply(adapter(a__weight=pair(11, 7), b__weight=pair(11, 7, alpha=1e3)), model, mode="merge")
    before = frozen(model)
    with pytest.raises(lf.LoraFormatError, match="LF-611"):
        handle.weight = 1e4
    assert frozen(model) == before
    assert handle.weight == 1.0


def test_a_public_name_is_what_it_says_whatever_was_imported_before():
    import importlib
    import pkgutil

    for module in pkgutil.iter_modules(torch_live.__path__):
        importlib.import_module(f"{torch_live.__name__}.{module.name}")
    assert all(callable(getattr(torch_live, name)) for name in torch_live.__all__)
    with pytest.raises(AttributeError):
        _ = torch_live.aply
