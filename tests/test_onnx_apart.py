"""Attentions that multiply by their weight themselves: taken apart where something runs beside the product, and put together again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import lora, model, save, session
from onnx import numpy_helper

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.attaching import apart
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.runtime import Session

HIDDEN, HEADS = 24, 4

# name → (attributes, inputs behind the bias, what they are, outputs, sizes of q, k and v)
FORMS = {
    "plain": ("", "", "", "y", (24, 24, 24)),
    "causal": ("unidirectional = 1", "", "", "y", (24, 24, 24)),
    "lengths": ("", "m", "int32[N] m", "y", (24, 24, 24)),
    "padding": ("", "m", "int32[N,T] m", "y", (24, 24, 24)),
    "mask of each token": ("mask_filter_value = -3.0", "m", "int32[N,T,T] m", "y", (24, 24, 24)),
    "added to scores, scaled": ("scale = 0.3", ", , a", "float[N,4,T,T] a", "y", (24, 24, 24)),
    "v of another size": ("qkv_hidden_sizes = [24, 24, 40], unidirectional = 1", "m", "int32[N,T] m", "y", (24, 24, 40)),
    "present": ("unidirectional = 1", "", "", "y, present", (24, 24, 24)),
    "past": ("unidirectional = 1", "m, past", "int32[N,M] m, float[2,N,4,P,6] past", "y, present", (24, 24, 24)),
}  # fmt: skip
NAMES = ("q", "k", "v")


def attention(form, *, opset=18):
    """The operator with its output projected, as others' graphs have it."""
    more, behind, declared, outputs, sizes = FORMS[form]
    present = ", float[2,N,4,M,6] present" if "present" in outputs else ""
    given = f", {declared}" if declared else ""
    attributes = ", ".join(filter(None, (f"num_heads = {HEADS}", more)))
    return model(f"""g (float[N,T,{HIDDEN}] x{given}) => (float[N,T,9] z{present})
      <float[{HIDDEN},{sum(sizes)}] w, float[{sum(sizes)}] b, float[{sizes[2]},9] o>
      {{ ["/m/attn/Attention"] {outputs} = com.microsoft.Attention <{attributes}> (x, w, b{"," if behind else ""} {behind})
         ["/m/o/MatMul"] z = MatMul(y, o) }}""", opset=opset)  # fmt: skip


def fed(form, tokens=5, past=3):
    """Values for all inputs, of four rows."""
    draw = np.random.default_rng(5)
    found = {"x": draw.standard_normal((4, tokens, HIDDEN)).astype(np.float32)}
    if form == "lengths":
        found["m"] = np.array([2, 5, 3, 4], np.int32)
    elif form == "mask of each token":
        found["m"] = draw.integers(0, 2, (4, tokens, tokens)).astype(np.int32)
    elif "int32[N," in FORMS[form][2]:
        whole = tokens + (past if form == "past" else 0)
        found["m"] = (np.arange(whole) >= np.array([[0], [1], [0], [2]])).astype(np.int32)
    if form == "past":
        found["past"] = draw.standard_normal((2, 4, HEADS, past, HIDDEN // HEADS)).astype(np.float32)
    if "a" in FORMS[form][1].split(", "):
        found["a"] = draw.standard_normal((4, HEADS, tokens, tokens)).astype(np.float32)
    return found


def ours(made, sizes, names, seed=1):
    """Pairs for q, k, v, and for the projection behind them, bound to their rows of the weight."""
    w = next(numpy_helper.to_array(t) for t in made.graph.initializer if t.name == "w").T
    ends, targets = np.cumsum((0, *sizes)), {}
    for n, name in enumerate(NAMES):
        if name in names:
            rows, place = w[ends[n] : ends[n + 1]], lf.Placement((sizes[n], HIDDEN), (0,), (1,))
            pair = replace(lora(sizes[n], HIDDEN, n + 2, seed=seed + n)["lora"], alpha=0.1, scale_rule="factor")
            targets[f"m.{name}_proj.weight"] = lf.Update((pair,), place, sketch=sketch(rows, place))
    targets["m.o.weight"] = lora(9, sizes[2], seed=seed + 7)
    return lf.Adapter(targets)


def outputs(path, feeds):
    return session(path).run(None, feeds)


def near(found, wanted, limit=1e-5):
    """Whether all outputs are as near as an attached model must be to the merged one."""
    return all(relative_error(one, other) <= limit for one, other in zip(found, wanted, strict=True))


class Case:
    """A base, two adapters of it, and what each of them makes of it when it is merged."""

    def __init__(self, form, folder, **how):
        self.made, self.feeds = attention(form, **how), fed(form)
        self.path, self.out, self.folder = save(self.made, folder / "base.onnx"), folder / "out.onnx", folder
        self.base, sizes = open_base(self.path), FORMS[form][4]
        self.given = {"all": ours(self.made, sizes, "qkv"), "some": ours(self.made, sizes, "vq", seed=20)}
        self.before = outputs(self.path, self.feeds)
        self.merged = {name: self.merge(adapter) for name, adapter in self.given.items()}
        for other in (self.before, self.merged["some"]):
            assert not near(self.merged["all"], other, 0.05)

    def merge(self, adapter, feeds=None):
        merge(adapter, self.base, self.folder / "merged.onnx", force=True)
        return outputs(self.folder / "merged.onnx", feeds or self.feeds)

    def attach(self, **options):
        plan = prepare("attach", list(self.given.items()), self.base, Options(self.out, **options))
        assert "1 × Attention is taken apart, into MatMul and MultiHeadAttention" in plan.notes
        self.base.apply(plan)
        onnx.checker.check_model(self.out, full_check=True)
        return plan

    def restored(self):
        """Whether what was attached comes out again, and leaves the model as it was."""
        detach(open_base(self.out), self.folder / "again.onnx")
        return (self.folder / "again.onnx").read_bytes() == self.path.read_bytes()


def swapped(form, folder, *, opset=18, **options):
    case = Case(form, folder, opset=opset)
    plan = case.attach(mode="swap", **options)
    running = Session(case.out)
    for name, adapter in case.given.items():
        running.load(name, case.folder / f"out.{name}.onnx_adapter")
        running.load(f"{name}, itself", adapter)
    for choice in ("all", "some", {"all, itself": 1.0}):
        wanted = case.merged[choice if isinstance(choice, str) else "all"]
        assert near(list(running.use(choice).run(case.feeds).values()), wanted)
    assert near(list(running.run(case.feeds).values()), case.before, 1e-6)
    assert prove(case.base, plan, _file(case)).holds
    assert case.restored()


def _file(case):
    np.savez(case.folder / "inputs.npz", **case.feeds)
    return case.folder / "inputs.npz"


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_an_attention_are_swapped(form, tmp_path):
    swapped(form, tmp_path)


@pytest.mark.parametrize("options", [{"slots": "required"}, {"pad_rank": 8}, {"opset": 12}])
def test_adapters_of_an_attention_are_swapped_otherwise(options, tmp_path):
    swapped("past", tmp_path, **options)


def stacked(form, provider, select, folder):
    """Each row computes with what it chose; of a mixture with the sum."""
    case = Case(form, folder)
    plan = case.attach(mode="stack", rows=("x",), provider=provider, select=select)
    index = np.array([0, 1, 2, 1])
    of_row = [case.before, case.merged["all"], case.merged["some"], case.merged["all"]]
    chosen = {"lora.index": index} if select == "index" else {"lora.weights": np.eye(3, 2, -1, dtype=np.float32)[index]}
    found = outputs(case.out, {**case.feeds, **chosen})
    for row, wanted in enumerate(of_row):
        limit = 1e-5 if index[row] else 1e-6
        assert near([found[0][row]], [wanted[0][row]], limit)
        assert near([value[:, row] for value in found[1:]], [value[:, row] for value in wanted[1:]], limit)
    assert prove(case.base, plan, _file(case)).holds
    for name, adapter in case.given.items():
        assert lf.digest(extract(open_base(case.out), name=name)) == lf.digest(adapter)
    assert case.restored()
    return case


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("provider", "select"), [("cpu", "index"), ("cuda", "index"), ("cpu", "weights")])
def test_rows_choose_among_adapters_of_an_attention(form, provider, select, tmp_path):
    stacked(form, provider, select, tmp_path)


def test_rows_mix_adapters_of_an_attention_and_refuse_none_that_there_is(tmp_path):
    case = Case("padding", tmp_path)
    case.attach(mode="stack", rows=("x",), select="weights")
    weights = np.array([[0, 0], [0.7, 0], [0.4, -0.3], [1, 1]], np.float32)
    found = (
        Session(case.out)
        .use([None, {"all": 0.7}, {"all": 0.4, "some": -0.3}, {"all": 1.0, "some": 1.0}])
        .run(case.feeds)["z"]
    )
    for row, (one, other) in enumerate(weights):
        mixed = {}
        for name, weight in (("all", one), ("some", other)):
            for key, update in case.given[name].items():
                part = replace(update["lora"], alpha=update["lora"].scale * float(weight), scale_rule="factor")
                mixed.setdefault(key, []).append(replace(update, parts=(part,)))
        sums = {
            key: lf.Update((lf.Delta(sum(u.matrix() for u in own)),), own[0].placement, sketch=own[0].sketch)
            for key, own in mixed.items()
        }
        assert near([found[row]], [case.merge(lf.Adapter(sums))[0][row]])


def test_an_index_that_is_no_adapters_is_an_error(tmp_path):
    case = Case("plain", tmp_path)
    case.attach(mode="stack", rows=("x",))
    with pytest.raises(
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="indices element out of data bounds"
    ):
        outputs(case.out, {**case.feeds, "lora.index": np.array([0, 1, 3, 0])})


def test_the_strength_of_an_adapter_of_an_attention_is_an_input(tmp_path):
    case = Case("past", tmp_path)
    case.given.pop("some")
    case.attach(live_scale=True)
    adapter = case.given["all"]
    halves = {k: replace(u, parts=(replace(u["lora"], alpha=u["lora"].alpha / 2),)) for k, u in adapter.items()}
    assert near(outputs(case.out, case.feeds), case.merged["all"])
    half = outputs(case.out, {**case.feeds, "lora.scale": np.array(0.5, np.float32)})
    assert near(half, case.merge(lf.Adapter(halves)))
    assert lf.digest(extract(open_base(case.out))) == lf.digest(adapter)
    assert case.restored()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("mode", ["swap", "stack"])
def test_a_target_that_is_the_whole_weight_is_found_by_its_name(mode, kind, tmp_path):
    """c_attn of GPT-2 is one module."""
    made = attention("padding")
    base, feeds = open_base(save(made, tmp_path / "base.onnx")), fed("padding")
    update = lora(72, HIDDEN, seed=4)
    if kind == "dora":
        update = replace(update, parts=(*update.parts, lf.Magnitude(np.linspace(3, 9, 72, dtype=np.float32))))
    adapter = lf.Adapter({"m.attn.weight": replace(update, placement=lf.Placement((72, HIDDEN), (0,), (1,)))})
    merge(adapter, base, tmp_path / "merged.onnx")
    plan = prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx", mode, rows=("x",)))
    base.apply(plan)
    wanted, before = outputs(tmp_path / "merged.onnx", feeds)[0], outputs(tmp_path / "base.onnx", feeds)[0]
    running = Session(tmp_path / "out.onnx")
    if mode == "swap":
        running.load("a", adapter)
        found = running.use("a").run(feeds)["z"]
    else:
        found = running.use(["a", None, "a", "a"]).run(feeds)["z"]
        assert near([found[1]], [before[1]], 1e-6)
        found[1] = wanted[1]
    assert near([found], [wanted])
    assert not near([wanted], [before], 0.05)


def test_one_weight_of_two_attentions_in_inner_graphs_is_changed_at_both(tmp_path):
    """As in the merged decoders of optimum: both branches of an If read the weights of the main graph."""
    made = model(f"""g (float[N,T,{HIDDEN}] x, bool c) => (float[N,T,{HIDDEN}] z) <float[{HIDDEN},72] w, float[72] b>
      {{ ["/m/if"] z = If (c) <
        then_branch = t () => (y) {{ ["/m/attn/Attention"] y = com.microsoft.Attention <num_heads = 4> (x, w, b) }},
        else_branch = e () => (y) {{ ["/m/attn/Attention"] y = com.microsoft.Attention <num_heads = 4, unidirectional = 1> (x, w, b) }}> }}""")
    path = save(made, tmp_path / "base.onnx")
    base, adapter = (
        open_base(path),
        lf.Adapter({k: u for k, u in ours(made, (24, 24, 24), "qv").items() if "proj" in k}),
    )
    base.apply(prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx", "swap")))
    merge(adapter, base, tmp_path / "merged.onnx")
    running = Session(tmp_path / "out.onnx")
    running.load("a", adapter)
    for branch in (True, False):
        feeds = {"x": fed("plain")["x"], "c": np.array(branch)}
        wanted, before = (outputs(tmp_path / name, feeds) for name in ("merged.onnx", "base.onnx"))
        assert near(list(running.use("a").run(feeds).values()), wanted)
        assert near(list(running.run(feeds).values()), before, 1e-6)
        assert not near(wanted, before, 0.05)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("mode", ["swap", "stack"])
def test_a_weight_in_codes_stays_inside(mode, tmp_path):
    """Of DequantizeLinear and MatMul ONNX Runtime 1.32 makes MatMulNBits, which rounds x: off would be 1 % from the base."""
    made = model(f"""g (float[N,T,{HIDDEN}] x) => (float[N,T,{HIDDEN}] y) <float[72] b, float s>
      {{ w = DequantizeLinear(codes, s)
         ["/m/attn/Attention"] y = com.microsoft.Attention <num_heads = 4> (x, w, b) }}""")
    made.graph.initializer.append(numpy_helper.from_array(np.ones((HIDDEN, 72), np.int8), "codes"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    adapter = lf.Adapter({"m.attn.weight": replace(lora(72, HIDDEN), placement=lf.Placement((72, HIDDEN), (0,), (1,)))})
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*cannot be taken apart(.|\n)*--mode branch"):
        prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx", mode, rows=("x",)))
    prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx"))


REFUSED = {
    "mask of 4 axes": ("(x, w, b, m)", "int32[N,1,M,M] m", "", "no mask of 4 axes"),
    "ends and starts": ("(x, w, b, m)", "int32[M] n", "ends", "no mask of ends and starts"),
    "one token for all": ("(x, w, b, m)", "int32[N,1] m", "", "no mask of one token for all"),
    "rotary": ("(x, w, b)", "", "do_rotary = 1", "it turns q and k by their positions itself"),
    "other sizes": ("(x, w, b)", "", "qkv_hidden_sizes = [24, 24, 28]", "are not the 72 columns of its weight"),
    "shared": ("(x, w, b)", "", "past_present_share_buffer = 1", "its past and present share a buffer"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("mode", ["swap", "stack"])
def test_what_the_other_operator_does_not_do_is_refused_by_its_reason(mode, case, tmp_path):
    call, declared, more, said = REFUSED[case]
    joined = "m = Concat <axis = 0> (n, n)" if more == "ends" else ""
    declared = f", {declared}".replace("[M] n", "[N] n") if declared else ""
    attributes = ", ".join(filter(None, ("num_heads = 4", more if joined == "" else "")))
    made = model(f"""g (float[N,T,{HIDDEN}] x{declared}) => (float[N,T,{HIDDEN}] y) <float[{HIDDEN},72] w, float[72] b>
      {{ {joined} ["/m/attn/Attention"] y = com.microsoft.Attention <{attributes}> {call} }}""")
    base = open_base(save(made, tmp_path / "base.onnx"))
    adapter = lf.Adapter({k: u for k, u in ours(made, (24, 24, 24), "q").items() if "proj" in k})
    with pytest.raises(lf.LoraFormatError, match=rf"LF-608 .*{said}(.|\n)*--mode branch"):
        prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx", mode, rows=("x",)))
    prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx"))


def test_a_record_of_what_was_taken_apart_that_cannot_be_read_is_refused(tmp_path):
    case = Case("plain", tmp_path)
    case.attach(mode="swap")
    for held in ("not base64!", "////", 5):
        changed = onnx.load(case.out)
        record = Record.read(changed)
        del changed.metadata_props[:]
        Record(record.attached, {**record.base, "apart": dict.fromkeys(record.base["apart"], held)}).write(changed)
        with pytest.raises(lf.LoraFormatError, match="LF-613"):
            detach(open_base(save(changed, tmp_path / "changed.onnx")), tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


# Mutants of the rewriting, each of which some form above must show.


def parts_exchanged(patch):
    whole = apart.Nodes.split
    patch.setattr(apart.Nodes, "split", lambda *args: whole(*args)[::-1])


def past_exchanged(patch):
    whole = apart.Nodes.store
    patch.setattr(apart.Nodes, "store", lambda own, role, v: whole(own, role, 1 - v if role.startswith("past/") else v))


def present_exchanged(patch):
    whole = apart.Apart._present
    patch.setattr(apart.Apart, "_present", lambda *args: whole(*args)[::-1])


def without(name):
    def mutate(patch):
        patch.setattr(apart, "_SHARED", tuple(word for word in apart._SHARED if word != name))

    return mutate


def without_input(number):
    def mutate(patch):
        whole = apart._input
        patch.setattr(apart, "_input", lambda node, at: "" if at == number else whole(node, at))

    return mutate


MUTANTS = {
    "parts exchanged": (parts_exchanged, "padding"),
    "past exchanged": (past_exchanged, "past"),
    "present exchanged": (present_exchanged, "present"),
    "not causal": (without("unidirectional"), "causal"),
    "another filter": (without("mask_filter_value"), "mask of each token"),
    "another scale": (without("scale"), "added to scores, scaled"),
    "no bias": (without_input(2), "plain"),
    "no mask": (without_input(3), "padding"),
    "no past": (without_input(4), "past"),
    "nothing added": (without_input(5), "added to scores, scaled"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_what_is_taken_apart_is_red(name, monkeypatch, tmp_path):
    mutant, form = MUTANTS[name]
    mutant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        swapped(form, tmp_path)
