"""What transformers does with older tensors while it loads them: ΔW goes through the same, by its own operations."""

import importlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mutants import net
from updates import normal

import loraformat as lf
from loraformat import Adapter, Delta, Lora, Update, testing
from loraformat.axes import Placement
from loraformat.naming import translate as translate_module
from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import Known
from loraformat.naming.translate import translate
from loraformat_converters.spaces import conversions, orders
from loraformat_converters.spaces.conversions import Conversion, converted

HEADS = {"num_attention_heads": 3}
EXPERTS = 4


def rules():
    """(model, transformers' own rule, ours) of each conversion that there is, once."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    make = importlib.import_module("loraformat_converters.spaces.make")
    seen = set()
    for model, found in sorted(_build_checkpoint_conversion_mapping().items()):
        for rule in found:
            if isinstance(rule, WeightConverter) and (entry := make.conversion(rule)) is not None:
                key = str(([type(op).__name__ for op in rule.operations], *entry))
                if key not in seen:
                    seen.add(key)
                    yield model, rule, Conversion.of(*entry)


def names_of(rule):
    """Pattern → older names."""
    plain = [pattern.replace("\\", "").replace("*", "{}") for pattern in rule.source_patterns]
    end = "weight" if plain[0].endswith(".") else ""
    for raw, name in zip(rule.source_patterns, plain, strict=True):
        yield raw, [f"{name}{end}".format(i) for i in (range(EXPERTS) if "*" in raw else range(1))]


def shape_of(rule, name):
    """A stack of experts where an operation speaks of its second axis; of sizes that divide by everything."""
    stacked = any(getattr(op, "dim", 0) == 1 or getattr(op, "dim1", 0) == 2 for op in rule.operations)
    rows = {"wte.embedding": 7, "wte.new_embedding": 2}.get(name, 36)
    return (3, rows, 5) if stacked and "*" not in str(rule.source_patterns) else (rows, 5)


def by_transformers(rule, tensors, sizes):
    """What its operations make of these older tensors, by the names there."""
    import torch

    held = {raw: [torch.from_numpy(tensors[name]) for name in names] for raw, names in names_of(rule)}
    model = SimpleNamespace(get_parameter=lambda name: SimpleNamespace(shape=sizes[name]))
    for op in rule.operations:
        held = op.convert(
            held, source_patterns=rule.source_patterns, target_patterns=rule.target_patterns,
            full_layer_name=rule.target_patterns[0], model=model, config=SimpleNamespace(**HEADS),
        )  # fmt: skip
    end = "weight" if rule.target_patterns[0].endswith(".") else ""
    return {f"{name}{end}": np.asarray(value[0] if isinstance(value, list) else value) for name, value in held.items()}


def update_of(shape, kind):
    """A change of a tensor of that shape, placed as transformers has its Linears and stacks of them."""
    out = len(shape) - 2
    place = Placement(shape, (out,), (out + 1,), tuple(range(out)))
    if kind == "delta":
        return Update((Delta(normal(*shape, seed=sum(shape))),), place)
    a, b = normal(*shape[:-2], 2, shape[-1]), normal(*shape[:-2], shape[-2], 2, seed=4)
    return Update((Lora(a, b, 3.0, "alpha/r"),), place)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_every_conversion_does_to_a_change_what_it_does_to_a_weight(kind):
    done = []
    for model, rule, ours in rules():
        olds = list(itertools.chain(*(names for _, names in names_of(rule))))
        before = {name: update_of(shape_of(rule, name), kind) for name in olds}
        before = {
            n: replace(u, parts=(replace(u.parts[0], alpha=1.0 + 0.5 * (kind == "delta")),)) for n, u in before.items()
        }
        sizes = dict(zip(rule.target_patterns, [(16, 5), (12, 5), (8, 5)], strict=False))
        wanted = by_transformers(rule, {name: update.delta() for name, update in before.items()}, sizes)
        known = Known(
            Adapter(before),
            {n: u.placement.shape for n, u in before.items()} | {n: w.shape for n, w in wanted.items()},
            HEADS,
        )
        links = list(converted({name: [name] for name in olds}, [[ours]], known, "test"))
        after = translate(Adapter(before), links, "torch").adapter
        assert after.keys() == wanted.keys(), (model, rule)
        for name, weight in wanted.items():
            assert after[name].placement.shape == weight.shape, (model, rule)
            assert testing.relative_error(after[name].delta(), weight) <= 1e-6, (model, rule)
        back = translate(after, [link.reversed() for link in links], "torch").adapter
        for name, update in before.items():
            assert testing.relative_error(back[name].delta(), update.delta()) <= 1e-6, (model, rule)
        done.append(ours.kind + ours.order.kind)
    assert set(done) == {"split", "splitinterleaved", "splitrotary", "divide", "join", "stack", "transpose"}
    assert len(done) > 40


# Without transformers: what the orders of rows are, and that code made wrong turns a check red.


def rotary(tmp_path):
    """Three heads of four rows, whose numbers of a rotation stand side by side: the halves of each, one after the other."""
    conversion = Conversion.of("split", ["wqkv"], ["q", "k", "v"], ["rotary", "vision_config", [0, 1]])
    after = moved({"wqkv": 36}, conversion, {"num_attention_heads": 9, "vision_config": HEADS})
    heads = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    assert rows_of(after) == {"q": heads, "k": [12 + row for row in heads], "v": list(range(24, 36))}


def interleaved(tmp_path):
    conversion = Conversion.of("split", ["w13"], ["gate", "up"], ["interleaved"])
    assert rows_of(moved({"w13": 8}, conversion)) == {"gate": [0, 2, 4, 6], "up": [1, 3, 5, 7]}


def halves(tmp_path):
    """Of five experts three for text and two for vision, gate and up one under the other."""
    olds = [r"experts\.(\d+)\.gate", r"experts\.(\d+)\.up"]
    conversion = Conversion.of("stack", olds, ["text", "vision"])
    names = {f"experts.{i}.{part}": 2 for i in range(5) for part in ("gate", "up")}
    after = moved(names, conversion)
    assert rows_of(after) == {"text": list(range(12)), "vision": list(range(12, 20))}


def transposed(tmp_path):
    before = {"gate": Update((Delta(normal(4, 6)),))}
    links = [Link(Seat("gate"), Seat("turned"), "test", transposed=True)]
    after = translate(Adapter(before), links, "torch").adapter["turned"]
    np.testing.assert_array_equal(after.matrix(), before["gate"].matrix().T)
    pair = Update((Lora(normal(2, 6), normal(4, 2), 3.0, "alpha/r"),))
    after = translate(Adapter({"gate": pair}), links, "torch").adapter["turned"]
    np.testing.assert_allclose(after.matrix(), pair.matrix().T, rtol=1e-6)


def moved(sizes, conversion, config=None):
    """Differences whose only column numbers all rows, through a conversion."""
    starts = itertools.accumulate(sizes.values(), initial=0)
    before = {
        n: Update((Delta(np.arange(s, s + size, dtype="f4")[:, None]),))
        for (n, size), s in zip(sizes.items(), starts, strict=False)
    }
    known = Known(Adapter(before), {name: (size, 1) for name, size in sizes.items()}, config or {})
    return translate(
        Adapter(before), converted({name: [name] for name in sizes}, [[conversion]], known, "test"), "torch"
    ).adapter


def rows_of(adapter):
    return {name: update.matrix().reshape(-1).astype(int).tolist() for name, update in adapter.items()}


def sides_stay(patch):
    patch.setattr(translate_module, "transposed", lambda update: update)


def heads_of_the_text(patch):
    real = orders.Order.share
    patch.setattr(
        orders.Order,
        "share",
        lambda self, number, of, config: real(self, number, of, {k: v for k, v in config.items() if k != self.config}),
    )


def value_rotated_too(patch):
    real = orders.Order.share
    patch.setattr(
        orders.Order, "share", lambda self, number, of, config: real(replace(self, only=range(of)), number, of, config)
    )


def order_of_the_way_back(patch):
    real = orders.Rotary.indices
    patch.setattr(
        orders.Rotary,
        "indices",
        lambda self, total: (
            (rows := real(self, total)).min() + np.argsort(rows).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)
        ),
    )


def odd_rows_first(patch):
    real = orders.Interleaved.indices
    patch.setattr(orders.Interleaved, "indices", lambda self, total: real(self, total) ^ 1)


def halves_of_floor(patch):
    real = conversions._experts
    patch.setattr(
        conversions,
        "_experts",
        lambda conversion, *given: ((n := real(conversion, *given)[1]) // len(conversion.news), n),
    )


CHECKS = {"rotary": rotary, "interleaved": interleaved, "halves": halves, "transposed": transposed}
MUTANTS = [
    (heads_of_the_text, "rotary"),
    (value_rotated_too, "rotary"),
    (order_of_the_way_back, "rotary"),
    (odd_rows_first, "interleaved"),
    (halves_of_floor, "halves"),
    (sides_stay, "transposed"),
]
test_a_conversion_is_as_stated, test_a_mutant_turns_it_red = net(CHECKS, MUTANTS)


def test_heads_that_nobody_states_give_no_link():
    conversion = Conversion.of("split", ["wq"], ["q"], ["rotary", None, [0]])
    with pytest.raises(lf.LoraFormatError) as caught:
        moved({"wq": 8}, conversion)
    assert {p.rule for p in caught.value.problems} == {"LF-602"}


def test_rows_that_are_no_heads_are_refused():
    conversion = Conversion.of("split", ["wq"], ["q"], ["rotary", None, [0]])
    with pytest.raises(lf.LoraFormatError) as caught:
        moved({"wq": 8}, conversion, HEADS)
    assert {p.rule for p in caught.value.problems} == {"LF-606"}
