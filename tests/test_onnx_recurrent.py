"""The weights of LSTM, GRU and RNN: torch's gates in ONNX's order, one direction below the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import inputs, lora, model, run, save
from onnx import numpy_helper

import loraformat as lf
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import attach, merge
from loraformat.verbs.verify import verify

H, IN, STEPS = 6, 10, 4
VERBS = {"merge": merge, "attach": attach}
both_verbs = pytest.mark.parametrize("verb", VERBS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, w, u, b, c):
    """torch.nn.LSTM's formulas: rows of i, f, g, o."""
    h = s = np.zeros((x.shape[1], H))
    out = []
    for row in x:
        i, f, g, o = np.split(row @ w.T + b + h @ u.T + c, 4, axis=1)
        s = sigmoid(f) * s + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(s)
        out.append(h)
    return np.stack(out)


def gru(x, w, u, b, c):
    """torch.nn.GRU's: rows of r, z, n."""
    h = np.zeros((x.shape[1], H))
    out = []
    for row in x:
        (ri, zi, ni), (rh, zh, nh) = (np.split(one, 3, axis=1) for one in (row @ w.T + b, h @ u.T + c))
        z = sigmoid(zi + zh)
        h = (1 - z) * np.tanh(ni + sigmoid(ri + rh) * nh) + z * h
        out.append(h)
    return np.stack(out)


def rnn(x, w, u, b, c):
    h = np.zeros((x.shape[1], H))
    out = []
    for row in x:
        h = np.tanh(row @ w.T + b + h @ u.T + c)
        out.append(h)
    return np.stack(out)


# operator → (torch's formulas, torch's gates in the order in which ONNX has them, attributes)
KINDS = {
    "LSTM": (lstm, "ifgo", "iofg", ""),
    "GRU": (gru, "rzn", "zrn", ", linear_before_reset = 1"),
    "RNN": (rnn, "h", "h", ""),
}


def in_onnx(kind, tensor):
    """Torch's rows [gates · H, …] as ONNX has them."""
    _, ours, theirs, _ = KINDS[kind]
    gates = dict(zip(ours, np.split(tensor, len(ours)), strict=True))
    return np.concatenate([gates[gate] for gate in theirs])


def parameters(kind, directions, seed=1):
    """Torch's parameters by name."""
    draw, rows = np.random.default_rng(seed), len(KINDS[kind][1]) * H
    ends = ["", "_reverse"][:directions]
    shapes = {"weight_ih": (rows, IN), "weight_hh": (rows, H), "bias_ih": (rows,), "bias_hh": (rows,)}
    return {
        f"lstm.{n}_l0{e}": 0.5 * draw.standard_normal(s).astype(np.float32) for e in ends for n, s in shapes.items()
    }


def graph(kind, directions, held, name="/lstm/{}"):
    way = ["forward", "bidirectional"][directions - 1]
    made = model(f"""g (float[{STEPS},N,{IN}] x) => (float[{STEPS},{directions},N,{H}] y)
      {{ ["{name.format(kind)}"] y = {kind} <hidden_size = {H}, direction = "{way}"{KINDS[kind][3]}> (x, w, r, b) }}""")
    ends = ["", "_reverse"][:directions]

    def stacked(name):
        return np.stack([in_onnx(kind, held[f"lstm.{name}_l0{end}"]) for end in ends])

    bias = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
    for tensor, values in (("w", stacked("weight_ih")), ("r", stacked("weight_hh")), ("b", bias)):
        made.graph.initializer.append(numpy_helper.from_array(values, tensor))
    return made


def computed(kind, directions, held, x):
    """[steps, directions, N, H] by torch's formulas."""
    formula, out = KINDS[kind][0], []
    for turn, end in enumerate(["", "_reverse"][:directions]):
        step = -1 if turn else 1
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        out.append(formula(x[::step], *(held[f"lstm.{name}_l0{end}"].astype(np.float64) for name in names))[::step])
    return np.stack(out, 1)


def pairs(held, *, bound):
    """(adapter, the parameters with ΔW)."""
    targets, changed = {}, dict(held)
    for seed, (key, weight) in enumerate((k, v) for k, v in held.items() if v.ndim == 2):
        update = lora(*weight.shape, rank=2 + seed % 2, seed=seed + 5)
        update = replace(update, parts=(replace(update["lora"], alpha=0.1, scale_rule="factor"),))
        changed[key] = weight + update.matrix()
        place = lf.Placement(weight.shape, (0,), (1,))
        targets[key] = replace(update, placement=place, sketch=sketch(weight, place)) if bound else update
    return lf.Adapter(targets), changed


@pytest.mark.parametrize("bound", [False, True], ids=["by names", "by sketches"])
@pytest.mark.parametrize("kind", KINDS)
@both_verbs
def test_every_gate_takes_its_own_rows(verb, kind, bound, tmp_path):
    check(verb, kind, 1, bound, tmp_path)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@both_verbs
def test_two_directions_are_found_by_their_sketches(verb, kind, tmp_path):
    check(verb, kind, 2, True, tmp_path)


def check(verb, kind, directions, bound, tmp_path):
    held = parameters(kind, directions)
    name = "node_{}" if bound else "/lstm/{}"
    path, out = save(graph(kind, directions, held, name), tmp_path / "base.onnx"), tmp_path / "out.onnx"
    adapter, changed = pairs(held, bound=bound)
    x = inputs(path)["x"]
    assert relative_error(run(path)["y"], computed(kind, directions, held, x)) <= 2e-6
    VERBS[verb](adapter, open_base(path), out)
    onnx.checker.check_model(out, full_check=True)
    for optimise in (False, True):
        found = run(out, optimise=optimise)["y"]
        assert relative_error(found, computed(kind, directions, changed, x)) <= 2e-6
    assert relative_error(run(path)["y"], found) > 0.05
    assert not verify(open_base(path), adapter, open_base(out)).problems
    if verb == "attach":
        assert lf.digest(extract(open_base(out))) == lf.digest(adapter)
        detach(open_base(out), tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@both_verbs
def test_a_weight_to_which_the_graph_adds_its_direction_is_changed_where_it_is_stored(verb, tmp_path):
    held = parameters("LSTM", 1)
    made = graph("LSTM", 1, held)
    adapter, changed = pairs(held, bound=False)
    for tensor, position in (("w", 1), ("r", 2)):
        stored = next(t for t in made.graph.initializer if t.name == tensor)
        del stored.dims[0]
        made.graph.node.insert(0, onnx.helper.make_node("Unsqueeze", [tensor, "zero"], [f"{tensor}_3d"]))
        made.graph.node[-1].input[position] = f"{tensor}_3d"
    made.graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero"))
    path, out = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    VERBS[verb](adapter, open_base(path), out)
    x = inputs(path)["x"]
    assert relative_error(run(out)["y"], computed("LSTM", 1, changed, x)) <= 2e-6
    assert not verify(open_base(path), adapter, open_base(out)).problems


def test_the_second_layer_has_a_number(tmp_path):
    held = parameters("LSTM", 1)
    base = open_base(save(graph("LSTM", 1, held, "/lstm/{}_1"), tmp_path / "base.onnx"))
    update = pairs(held, bound=False)[0]["lstm.weight_ih_l0"]
    found = base.resolve(lf.Adapter({"lstm.weight_ih_l1": update, "lstm.weight_ih_l0": update}), lf.Hints())
    assert list(found.targets) == ["lstm.weight_ih_l1"]
    assert found.targets["lstm.weight_ih_l1"][0].as_json()["permute"] == [0, 3, 1, 2]


def test_names_do_not_tell_one_direction_from_the_other(tmp_path):
    held = parameters("LSTM", 2)
    base = open_base(save(graph("LSTM", 2, held), tmp_path / "base.onnx"))
    assert not base.resolve(pairs(held, bound=False)[0], lf.Hints()).targets


def test_gates_of_another_program_are_not_taken_for_torchs(tmp_path):
    held = parameters("LSTM", 1)
    base = open_base(save(graph("LSTM", 1, held), tmp_path / "base.onnx"))
    foreign = replace(pairs(held, bound=False)[0], names="keras")
    found = base.resolve(foreign, lf.Hints(names={"lstm.weight_ih_l0": "w", "lstm.weight_hh_l0": "r"}))
    assert [(p.rule, "another order" in p.what) for p in found.unresolved] == [("LF-604", True)] * 2


@both_verbs
def test_what_is_no_sum_is_refused(verb, tmp_path):
    held = parameters("GRU", 1)
    update = pairs(held, bound=False)[0]["lstm.weight_ih_l0"]
    dora = replace(update, parts=(*update.parts, lf.Magnitude(np.ones(3 * H, np.float32))))
    base = open_base(save(graph("GRU", 1, held), tmp_path / "base.onnx"))
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*its gates lie in another order, and dora is no sum"):
        VERBS[verb](lf.Adapter({"lstm.weight_ih_l0": dora}), base, tmp_path / "out.onnx")


@both_verbs
def test_one_of_the_two_biases_is_refused_with_a_way(verb, tmp_path):
    held = parameters("LSTM", 1)
    base = open_base(save(graph("LSTM", 1, held), tmp_path / "base.onnx"))
    given = lf.Adapter({"lstm.bias_hh_l0": lf.Update((lf.Replace(held["lstm.bias_hh_l0"]),))})
    with pytest.raises(lf.LoraFormatError, match=r"LF-602 .*two biases in one tensor.*\n.*then export"):
        VERBS[verb](given, base, tmp_path / "out.onnx")
