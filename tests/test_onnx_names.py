"""Which site a target is: by whole names, one rule for all, witnesses that agree; else a refusal that says what to do."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import adapter, lora, model, run, save, stored

from loraformat import Adapter, Hints, LoraFormatError, Placement, Update
from loraformat.base import Options
from loraformat.parts import Delta, Replace, Rows
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.verbs.init import init
from loraformat.verbs.merge import attach, merge, prepare
from loraformat_converters.onnx.finding.align import align


def chain(*nodes, square=6):
    """A graph of MatMuls one after the other: each a name, or (name, weight); weights without a name are w0, w1, …"""
    pairs = [(n, f"w{i}") if isinstance(n, str) else n for i, n in enumerate(nodes)]
    weights = ", ".join(f'float[{square},{square}] "{w}"' for w in dict.fromkeys(w for _, w in pairs))
    lines = [f'["{n}"] v{i + 1} = MatMul(v{i}, "{w}")' for i, (n, w) in enumerate(pairs)]
    return model(f"g (float[N,{square}] v0) => (float[N,{square}] v{len(pairs)}) <{weights}> {{ {' '.join(lines)} }}")


def scoped(made, *modules):
    """The same graph with the name scopes that torch's exporter leaves, one module a node."""
    for i, (node, module) in enumerate(zip(made.graph.node, modules, strict=True)):
        if module is not None:
            parents = [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)]
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(["", *parents, f"linear_{i}"]))
    return made


def resolve(made, keys, tmp_path, names=None, axes=None):
    """(key → names of the weights, problems)."""
    base = open_base(save(made, tmp_path / "base.onnx"))
    targets = keys if isinstance(keys, Adapter) else adapter(dict.fromkeys(keys, (6, 6)))
    found = base.resolve(targets, Hints(names or {}, axes or {}))
    weights = {key: {match.weight for match in places} for key, places in found.targets.items()}
    return weights, [*found.unresolved, *found.ambiguous]


def refusal(made, keys, tmp_path, **hints):
    """The only problem of resolving."""
    _, problems = resolve(made, keys, tmp_path, **hints)
    assert len(problems) == 1, problems
    return problems[0]


def test_a_target_is_found_by_the_node_that_its_module_names(tmp_path):
    found, problems = resolve(chain("/enc/q/MatMul", "/enc/k/MatMul"), ["enc.k.weight"], tmp_path)
    assert (found, problems) == ({"enc.k.weight": {"w1"}}, [])


def test_a_target_is_found_by_the_name_of_its_tensor(tmp_path):
    made = chain(("a", "enc.q.weight"), ("b", "enc.k.weight"))
    assert resolve(made, ["enc.k.weight"], tmp_path) == ({"enc.k.weight": {"enc.k.weight"}}, [])


def test_a_target_is_found_by_the_scopes_that_torch_leaves(tmp_path):
    made = scoped(chain("node_1", "node_2"), "enc.q", "enc.k")
    assert resolve(made, ["enc.k.weight"], tmp_path) == ({"enc.k.weight": {"w1"}}, [])


@pytest.mark.parametrize("scopes", ["[", "3", "['']", "['a', 3, 'b']", "[" * 500, "__import__('os')"])
def test_scopes_that_are_none_say_nothing(scopes, tmp_path):
    made = chain("node_1")
    made.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert refusal(made, ["enc.q.weight"], tmp_path).rule == "LF-602"


def test_layer_1_is_not_layer_11(tmp_path):
    made = chain("/layers.11/q/MatMul", "/layers.1/q/MatMul")
    assert resolve(made, ["layers.1.q.weight"], tmp_path) == ({"layers.1.q.weight": {"w1"}}, [])
    assert refusal(chain("/layers.11/q/MatMul"), ["layers.1.q.weight"], tmp_path).rule == "LF-602"


def test_a_name_within_a_name_is_another_name(tmp_path):
    problem = refusal(chain("/enc/kq_proj/MatMul", "/enc/q_proj_norm/MatMul"), ["enc.q_proj.weight"], tmp_path)
    assert problem.rule == "LF-602"
    assert "enc.kq_proj" in problem.what


@pytest.mark.parametrize(("node", "key"), [("/kq_proj/MatMul", "q_proj.weight"), ("/q_proj/MatMul", "kq_proj.weight")])
def test_a_name_that_ends_like_another_is_another_name(node, key, tmp_path):
    assert refusal(chain(node), [key], tmp_path).rule == "LF-602"


@pytest.mark.parametrize("node", ["enc/q/MatMul", "xenc/q/MatMul", "/enc/q/part", "/enc/q/Gemm", "/enc.q"])
def test_a_node_named_in_another_way_says_nothing(node, tmp_path):
    assert refusal(chain(node), ["enc.q.weight"], tmp_path).rule == "LF-602"


def test_a_missing_target_is_told_with_the_nearest_names_and_a_map(tmp_path):
    problem = refusal(chain("/enc/query/MatMul", "/enc/key/MatMul"), ["enc.qery.weight"], tmp_path)
    assert problem.rule == "LF-602"
    assert "nearest: enc.query" in problem.what
    assert '--names map.json with {"enc.qery.weight": ' in problem.fix


def test_one_missing_target_is_an_error_though_the_others_are_found(tmp_path):
    made = chain("/enc/q/MatMul", "/enc/k/MatMul")
    found, problems = resolve(made, ["enc.q.weight", "enc.v.weight"], tmp_path)
    assert (list(found), [p.where for p in problems]) == (["enc.q.weight"], ["enc.v.weight"])


@pytest.mark.parametrize("prefix", ["m.", "model.base."])
def test_a_graph_may_have_one_prefix_more_for_all(prefix, tmp_path):
    made = scoped(chain("n1", "n2"), f"{prefix}layers.0.q", f"{prefix}layers.1.q")
    found, problems = resolve(made, ["layers.0.q.weight", "layers.1.q.weight"], tmp_path)
    assert (found, problems) == ({"layers.0.q.weight": {"w0"}, "layers.1.q.weight": {"w1"}}, [])


def test_an_adapter_may_have_one_prefix_more_for_all(tmp_path):
    made = chain("/layers.0/q/MatMul", "/layers.1/q/MatMul")
    keys = ["bert.layers.0.q.weight", "bert.layers.1.q.weight"]
    assert resolve(made, keys, tmp_path) == ({keys[0]: {"w0"}, keys[1]: {"w1"}}, [])


def test_a_prefix_is_told_by_the_plan(tmp_path):
    base = open_base(save(chain("/q/MatMul"), tmp_path / "base.onnx"))
    plan = prepare("merge", [("default", adapter({"decoder.q.weight": (6, 6)}))], base, Options(tmp_path / "out.onnx"))
    assert plan.notes == ("prefix: the graph's names are the adapter's without decoder. in front",)


def test_a_prefix_that_does_not_serve_all_targets_serves_none(tmp_path):
    made = chain("/m/a/q/MatMul", "/other/b/q/MatMul")
    found, problems = resolve(made, ["a.q.weight", "b.q.weight"], tmp_path)
    assert (found, {p.rule for p in problems}) == ({}, {"LF-602"})


def test_a_prefix_of_most_targets_leaves_the_others_alone_to_be_told(tmp_path):
    """A pooler that the exported graph does not call is one missing target, not the sign of another model."""
    made = chain("/m/a/q/MatMul", "/m/a/k/MatMul", "/m/p/MatMul")
    wanted = ["pooler.dense.weight", "a.q.weight", "a.k.weight"]
    found, problems = resolve(made, wanted, tmp_path)
    assert found == {"a.q.weight": {"w0"}, "a.k.weight": {"w1"}}
    assert [(problem.rule, problem.where) for problem in problems] == [("LF-602", "pooler.dense.weight")]
    assert "--only for the others, if what the graph gives does not depend on it" in problems[0].fix
    base = open_base(save(made, tmp_path / "again.onnx"))
    resolution = base.resolve(adapter(dict.fromkeys(wanted, (6, 6))), Hints({"pooler.dense.weight": "m.p"}))
    assert resolution.require().targets.keys() == set(wanted)


def test_two_prefixes_that_serve_all_are_a_choice_that_nobody_made(tmp_path):
    made = chain("/encoder/layers.0/q/MatMul", "/decoder/layers.0/q/MatMul")
    problem = refusal(made, ["layers.0.q.weight"], tmp_path)
    assert problem.rule == "LF-603"
    assert "with decoder. in front, with encoder. in front" in problem.what


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ("/model/layers.2/q/MatMul", "model.layers.1.q.weight"),
        ("/q/MatMul", "model.layers.1.q.weight"),
        ("/model/layers.2/q/MatMul", "q.weight"),
        ("/layers.2/layers.1/q/MatMul", "layers.1.q.weight"),
    ],
)
def test_a_single_target_is_not_carried_across_a_number(node, key, tmp_path):
    assert refusal(chain(node), [key], tmp_path).rule == "LF-602"


def test_two_witnesses_that_disagree_are_both_printed(tmp_path):
    made = scoped(chain("/enc/q/MatMul", "/enc/k/MatMul"), "enc.k", "enc.q")
    problem = refusal(made, ["enc.q.weight"], tmp_path)
    assert problem.rule == "LF-603"
    assert "name_scopes: enc.q → /enc/k/MatMul (w1); node_name: enc.q → /enc/q/MatMul (w0)" in problem.what


def test_witnesses_that_name_two_modules_of_one_weight_disagree_too(tmp_path):
    made = scoped(chain(("/enc/q/MatMul", "w"), ("/enc/k/MatMul", "w")), "enc.k", "enc.q")
    assert refusal(made, ["enc.q.weight"], tmp_path).rule == "LF-603"


def test_one_module_with_two_weights_is_ambiguous(tmp_path):
    problem = refusal(chain("/enc/q/MatMul", "/enc/q/MatMul_1"), ["enc.q.weight"], tmp_path)
    assert problem.rule == "LF-603"
    assert "2 weights: w0, w1" in problem.what


def test_nodes_of_one_name_are_told_apart_by_their_weights(tmp_path):
    made = chain(("same", "enc.q.weight"), ("same", "enc.k.weight"))
    assert resolve(made, ["enc.k.weight"], tmp_path)[0] == {"enc.k.weight": {"enc.k.weight"}}
    problem = refusal(made, ["x.weight"], tmp_path, names={"x.weight": "same"})
    assert problem.rule == "LF-603"


def test_a_tensor_that_two_modules_share_means_neither_by_its_name(tmp_path):
    made = scoped(chain(("n1", "tied.weight"), ("n2", "tied.weight")), "a", "b")
    problem = refusal(made, ["tied.weight"], tmp_path)
    assert problem.rule == "LF-609"
    assert "a, b" in problem.what


def test_metadata_tells_a_tied_module_from_a_second_call(tmp_path):
    """TorchScript calls the second call of ``fc`` ``fc_1``; metadata names a module by its own name at each call."""
    made = scoped(chain(("n1", "w"), ("n2", "w"), ("n3", "w")), "fc", "fc_1", "fc")
    base = open_base(save(made, tmp_path / "base.onnx"))
    found = base.resolve(adapter({"fc.weight": (6, 6)}), Hints()).targets["fc.weight"]
    assert [match.node for match in found] == ["n1", "n3"]
    base = open_base(save(scoped(chain(("n1", "w"), ("n2", "w")), "fc", "fc_1"), tmp_path / "two.onnx"))
    both = base.resolve(adapter({"fc.weight": (6, 6), "fc_1.weight": (6, 6)}), Hints()).require().targets
    assert {key: [match.node for match in places] for key, places in both.items()} == {
        "fc.weight": ["n1"],
        "fc_1.weight": ["n2"],
    }


def test_a_second_call_that_may_be_a_module_of_its_own_is_none(tmp_path):
    made = chain(("/fc/MatMul", "w"), ("/fc_1/MatMul", "w"))
    assert resolve(made, ["fc.weight"], tmp_path) == ({"fc.weight": {"w"}}, [])
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(6, np.float32), "fc_1.bias"))
    problem = refusal(made, ["fc.weight"], tmp_path)
    assert problem.rule == "LF-609"
    assert "as a second call of the target's module, or as fc_1" in problem.what


def test_two_nameless_uses_of_a_tensor_may_be_two_modules(tmp_path):
    made = chain(("n1", "tied.weight"), ("n2", "tied.weight"))
    assert refusal(made, ["tied.weight"], tmp_path).rule == "LF-609"
    found, problems = resolve(made, ["tied.weight"], tmp_path, names={"tied.weight": "tied.weight"})
    assert (found, problems) == ({"tied.weight": {"tied.weight"}}, [])


def test_a_head_tied_to_the_embedding_is_the_multiplication(tmp_path):
    made = model("""g (int64[N] i) => (float[N,9] y) <float[9,6] "head.weight">
      { ["embed"] h = Gather("head.weight", i)  t = Transpose("head.weight")  ["head"] y = MatMul(h, t) }""")
    base = open_base(save(made, tmp_path / "base.onnx"))
    places = base.resolve(adapter({"head.weight": (9, 6)}), Hints()).require().targets["head.weight"]
    assert [place.node for place in places] == ["head"]


def test_two_targets_for_one_node_are_an_error(tmp_path):
    made = chain("/enc/q/MatMul")
    problem = refusal(made, ["enc.q.weight", "enc.k.weight"], tmp_path, names={"enc.k.weight": "/enc/q/MatMul"})
    assert problem.rule == "LF-603"
    assert "enc.q.weight means the node /enc/q/MatMul too" in problem.what


def test_a_module_is_found_by_its_weight_not_by_another_parameter(tmp_path):
    bias = Adapter({"enc.q.bias": Update((Delta(np.ones(6, np.float32), 1.0),), Placement((6,), (0,), ()))})
    assert refusal(chain("/enc/q/MatMul"), bias, tmp_path).rule == "LF-602"
    assert refusal(chain("/enc/MatMul"), ["enc.in_proj_weight"], tmp_path).rule == "LF-602"


@pytest.mark.parametrize("name", ["n1", "enc.k.weight", "enc.k", "w1"])
def test_a_map_names_a_node_a_parameter_a_module_or_a_tensor(name, tmp_path):
    made = scoped(chain("n0", "n1"), "enc.q", "enc.k")
    found, problems = resolve(made, ["x.weight"], tmp_path, names={"x.weight": name})
    assert (found, problems) == ({"x.weight": {"w1"}}, [])


def test_a_map_may_carry_a_whole_prefix(tmp_path):
    made = chain("/bert/enc.0/q/MatMul", "/bert/enc.1/q/MatMul")
    keys = ["layers.0.q.weight", "layers.1.q.weight"]
    found, problems = resolve(made, keys, tmp_path, names={"layers.*": "bert.enc.*"})
    assert (found, problems) == ({keys[0]: {"w0"}, keys[1]: {"w1"}}, [])


def test_a_prefix_map_means_the_module_not_all_that_share_its_tensor(tmp_path):
    made = chain(("/b/q/MatMul", "b.q.weight"), ("/b/k/MatMul", "b.q.weight"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    places = base.resolve(adapter({"a.q.weight": (6, 6)}), Hints({"a.*": "b.*"})).require().targets["a.q.weight"]
    assert [place.node for place in places] == ["/b/q/MatMul"]


def test_a_map_that_contradicts_the_graph_is_refused(tmp_path):
    problem = refusal(chain("/enc/q/MatMul", "n1"), ["enc.q.weight"], tmp_path, names={"enc.q.weight": "n1"})
    assert problem.rule == "LF-603"
    assert "user: n1" in problem.what


def test_a_map_to_nothing_is_told_with_the_nearest_names(tmp_path):
    problem = refusal(chain("node_q", "node_k"), ["x.weight"], tmp_path, names={"x.weight": "node_qq"})
    assert problem.rule == "LF-602"
    assert "nearest: node_q" in problem.what


def test_a_map_entry_that_no_target_asks_for_is_an_error(tmp_path):
    problem = refusal(chain("/enc/q/MatMul"), ["enc.q.weight"], tmp_path, names={"enc.typo.weight": "w0"})
    assert (problem.rule, problem.where) == ("LF-705", "enc.typo.weight")


def test_axes_are_the_parameters_own_and_must_fit_its_operator(tmp_path):
    made = chain("/enc/q/MatMul")
    assert resolve(made, ["enc.q.weight"], tmp_path, axes={"q": "out,in"})[1] == []
    assert refusal(made, ["enc.q.weight"], tmp_path, axes={"q": "out,in,batch"}).rule == "LF-705"
    assert resolve(made, ["enc.q.weight"], tmp_path, axes={"q": "in,out"})[1] == []


def test_the_evidence_says_which_rungs_spoke(tmp_path):
    made = scoped(chain("/enc/q/MatMul"), "enc.q")
    base = open_base(save(made, tmp_path / "base.onnx"))
    (place,) = base.resolve(adapter({"enc.q.weight": (6, 6)}), Hints()).targets["enc.q.weight"]
    said = ("name_scopes: enc.q", "node_name: enc.q", "operator: MatMul reads the weight as [in,out]")
    assert place.evidence == said


def test_a_target_of_another_shape_is_not_of_this_base(tmp_path):
    base = open_base(save(chain("/enc/q/MatMul"), tmp_path / "base.onnx"))
    with pytest.raises(LoraFormatError, match="LF-606"):
        merge(adapter({"enc.q.weight": (6, 5)}), base, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_fresh_adapter_has_a_pair_for_every_site_and_the_names_resolve(tmp_path):
    made = scoped(chain("n0", "/enc/k/MatMul", "n2"), "enc.q", None, None)
    base = open_base(save(made, tmp_path / "base.onnx"))
    fresh = init(base, ["q", "k", "w2"], rank=2, alpha=2)
    assert sorted(fresh) == ["enc.k.weight", "enc.q.weight", "w2"]
    assert base.resolve(fresh, Hints()).require().targets.keys() == fresh.keys()


def test_a_second_call_is_known_by_its_number_and_its_weight_together(tmp_path):
    made = chain(("/m/q/MatMul", "w"), ("/m/q_1/MatMul", "w"), ("/m/q_2/MatMul", "other"), ("/m/q_proj/MatMul", "w"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    places = base.resolve(adapter({"m.q.weight": (6, 6)}), Hints()).targets["m.q.weight"]
    assert [place.node for place in places] == ["/m/q/MatMul", "/m/q_1/MatMul"]


def test_a_second_call_that_is_a_target_itself_is_two_targets_for_one_node(tmp_path):
    made = chain(("/m/q/MatMul", "w"), ("/m/q_1/MatMul", "w"))
    assert refusal(made, ["m.q.weight", "m.q_1.weight"], tmp_path).rule == "LF-603"


def test_two_square_weights_are_not_mistaken_for_each_other(tmp_path):
    update = Adapter({"enc.k.weight": lora(6, 6)})
    made = chain("/enc/q/MatMul", "/enc/k/MatMul")
    merge(update, open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx")
    old, new = stored(tmp_path / "base.onnx"), stored(tmp_path / "out.onnx")
    np.testing.assert_array_equal(new["w0"], old["w0"])
    np.testing.assert_allclose(new["w1"], old["w1"] + update["enc.k.weight"].matrix().T, rtol=1e-6, atol=1e-6)
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_a_numbered_wrapper_is_seen_through_where_several_layered_names_fit():
    names = [f"0.auto_model.layer.{i}.{leaf}" for i in range(2) for leaf in ("q", "k")]
    wanted = ["layer.0.q", "layer.1.k"]
    assert align(wanted, names).names == {name: f"0.auto_model.{name}" for name in wanted}
    assert align(["q", "k"], names).names == {}
    assert align([*wanted, "pooler"], names).names == align(wanted, names).names
    assert align(["q", "k", "norm.1"], ["h.1.q", "h.1.k"]).names == {}


@pytest.mark.parametrize("same", [True, False])
def test_one_module_with_its_weight_in_copies_changes_in_all_and_with_others_in_none(same, tmp_path):
    """A module that is called three times, as dynamo exports it: a weight a call, of one value."""
    made = scoped(chain("n0", "n1", "n2"), "enc.q", "enc.q", "enc.k")
    if same:
        made.graph.initializer[1].raw_data = made.graph.initializer[0].raw_data
    found, problems = resolve(made, ["enc.q.weight"], tmp_path)
    assert found == ({"enc.q.weight": {"w0", "w1"}} if same else {})
    assert [problem.rule for problem in problems] == ([] if same else ["LF-603"])
    if not same:
        return
    given, base = adapter({"enc.q.weight": (6, 6)}), open_base(tmp_path / "base.onnx")
    merge(given, base, tmp_path / "merged.onnx")
    attach(given, base, tmp_path / "attached.onnx")
    delta = given["enc.q.weight"].matrix()
    old, new = stored(tmp_path / "base.onnx"), stored(tmp_path / "merged.onnx")
    for name in ("w0", "w1"):
        assert np.allclose(new[name], old[name] + delta.T, atol=1e-6)
    assert np.array_equal(new["w2"], old["w2"])
    (ours,), (theirs,) = (run(tmp_path / f"{name}.onnx").values() for name in ("attached", "merged"))
    assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoraFormatError, match="LF-608"):
        attach({"a": given}, base, tmp_path / "swap.onnx", mode="swap")


def test_a_sequentials_children_have_its_name_twice_in_their_nodes(tmp_path):
    """As torchvision's networks export by TorchScript; where another node has that name, it keeps it."""
    made = chain("/m/ff/ff.0/MatMul", "/m/h.1/h.1.1/h.1.1.0/MatMul", "/m/h.1/h.1.0/MatMul", "/m/q/MatMul")
    found, problems = resolve(made, ["ff.0.weight", "h.1.1.0.weight", "h.1.0.weight", "q.weight"], tmp_path)
    assert found == {"ff.0.weight": {"w0"}, "h.1.1.0.weight": {"w1"}, "h.1.0.weight": {"w2"}, "q.weight": {"w3"}}
    assert problems == []
    made = chain("/ff/ff.0/MatMul", "/ff.0/MatMul")
    found, problems = resolve(made, ["ff.0.weight", "ff.ff.0.weight"], tmp_path)
    assert (found, problems) == ({"ff.0.weight": {"w1"}, "ff.ff.0.weight": {"w0"}}, [])


def biased(*modules):
    """A chain of MatMuls, each with its Add: (what the nodes are called, what the bias is)."""
    held = ", ".join(f'float[6] "{b}"' for b in dict.fromkeys(b for _, b in modules))
    lines = [
        f'["/{n}/MatMul"] h{i} = MatMul(v{i}, w{i}) ["/{n}/Add"] v{i + 1} = Add("{b}", h{i})'
        for i, (n, b) in enumerate(modules)
    ]
    weights = ", ".join(f"float[6,6] w{i}" for i in range(len(modules)))
    return model(f"g (float[N,6] v0) => (float[N,6] v{len(modules)}) <{weights}, {held}> {{ {' '.join(lines)} }}")


def test_a_module_in_one_that_is_not_called_is_known_by_its_bias(tmp_path):
    made = biased(("x", "x.bias"), ("q", "a.q.bias"), ("q_1", "b.0.q.bias"))
    keys = ["x.weight", "a.q.weight", "b.0.q.weight"]
    assert resolve(made, keys, tmp_path) == ({keys[0]: {"w0"}, keys[1]: {"w1"}, keys[2]: {"w2"}}, [])


@pytest.mark.parametrize("other", ["a.q.bias", "a.k.bias", "q_bias", "a.q.scale"])
def test_a_bias_of_two_modules_or_of_another_name_tells_nothing(other, tmp_path):
    """Equal biases of two modules are stored as one, by the name of the first."""
    made = biased(("x", "x.bias"), ("q", other), ("q_1", "a.q.bias" if other == "a.q.bias" else "b.q.bias"))
    wanted = "a.k.weight" if other == "a.k.bias" else "a.q.weight"
    problem = refusal(made, ["x.weight", wanted], tmp_path)
    assert (problem.rule, problem.where) == ("LF-602", wanted)


def nameless(text):
    """q, and what is behind it, of which no node is called after a module."""
    return model(
        f'g (float[N,6] x) => (float[N,6] y) <float[6,6] w, float[6,6] v, float[6] "m.q.bias", float[6] "m.n.bias"> {{ {text} }}'
    )


@pytest.mark.parametrize(
    "text",
    [
        'y = Gemm(x, w, "m.q.bias")',
        'h = MatMul(x, w) y = Add("m.q.bias", h)',
        'h = MatMul(x, w) a = Add(h, "m.q.bias") y = Add(a, "m.n.bias")',
    ],
)
def test_a_product_without_a_name_is_of_the_module_whose_bias_is_added_to_it(text, tmp_path):
    """As onnxsim (0.8) leaves a MatMul and its Add, and a quantiser what dynamo exported."""
    assert resolve(nameless(text), ["m.q.weight"], tmp_path) == ({"m.q.weight": {"w"}}, [])
    assert refusal(nameless(text), ["m.n.weight"], tmp_path).rule == "LF-602"


@pytest.mark.parametrize(
    "text",
    [
        'h = Gemm(x, w, "m.q.bias") y = Gemm(h, v, "m.q.bias")',
        'h = MatMul(x, w) a = Add(h, "m.q.bias") b = Add(h, "m.n.bias") y = Mul(a, b)',
        'h = MatMul(x, w) y = LayerNormalization(h, "m.n.bias", "m.q.bias")',
        'h = MatMul(x, w) y = Mul(h, "m.q.bias")',
        '["/other/MatMul"] h = MatMul(x, w) y = Add(h, "m.q.bias")',
        'h = MatMul(x, w) a = Relu(h) y = Add(a, "m.q.bias")',
    ],
)
def test_a_bias_of_several_of_a_norm_or_behind_something_tells_no_module(text, tmp_path):
    assert refusal(nameless(text), ["m.q.weight"], tmp_path).rule == "LF-602"


HEAD = "lm_head.weight"
TIED = """g (int64[N] ids) => (float[N,9] y) <float[9,4] "m.lm_head.weight", float[4,9] val_9, float[4,9] "n.other.weight">
  { h = Gather("m.lm_head.weight", ids) ["node_linear"] y = MatMul(h, val_9) }"""
"""A tied model that dynamo exported and a tool took the metadata of: the table has the head's name, and the head none."""


@pytest.mark.parametrize("kind", ["pair", "trained", "tokens"])
def test_a_table_that_has_the_name_of_the_head_is_not_taken_for_it(kind, tmp_path):
    values = np.ones((9, 4), np.float32)
    parts = {"pair": lora(9, 4)["lora"], "trained": Replace(values), "tokens": Rows(values[:2], np.array([1, 4]))}
    head = Adapter({HEAD: Update((parts[kind],))})
    problem = refusal(model(TIED), head, tmp_path)
    assert (problem.rule, problem.where) == ("LF-609", HEAD)
    assert "only a look-up reads m.lm_head.weight; node_linear" in problem.what
    assert resolve(model(TIED), head, tmp_path, {HEAD: "node_linear"}) == ({HEAD: {"val_9"}}, [])
    alone = model(TIED.replace("val_9)", '"n.other.weight")'))  # no product without a name could be the head
    assert resolve(alone, Adapter({HEAD: Update((parts["trained"],))}), tmp_path) == ({HEAD: {"m.lm_head.weight"}}, [])


def test_values_tell_the_head_of_a_tied_table(tmp_path):
    made = model(TIED)
    table, product = made.graph.initializer[:2]
    product.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(table).T.copy(), "val_9"))
    weight, place = onnx.numpy_helper.to_array(table), Placement((9, 4), (0,), (1,))
    bound = Adapter({HEAD: Update(lora(9, 4).parts, place, sketch=sketch(weight, place))})
    assert resolve(made, bound, tmp_path) == ({HEAD: {"val_9"}}, [])
