"""What torch exported and PEFT adapted: the changed ONNX model gives PEFT's own outputs."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from graphs import session, stored

from loraformat import Adapter, Hints, Lora, Update
from loraformat.registry import load, open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach, merge
from loraformat.verbs.verify import verify

pytestmark = pytest.mark.peer

MODELS = ("minilm", "bert", "bert-dora", "llama-saved", "llama-tied", "gpt2", "shared-2d", "shared-3d")
EXPORTERS = ("torchscript", "dynamo")
VERBS = {"attach": attach, "merge": merge}

every_export = pytest.mark.parametrize(
    ("name", "exporter"), [(name, exporter) for name in MODELS for exporter in EXPORTERS]
)
both_verbs = pytest.mark.parametrize("verb", VERBS)


def outputs(path, given, *, optimise=True):
    return session(path, optimise=optimise).run(["out"], dict(given.feeds))[0]


@every_export
def test_the_export_computes_what_torch_computes(name, exporter, export):
    given = export(name, exporter)
    assert relative_error(outputs(given.model, given), given.base) <= 1e-5
    assert relative_error(given.base, given.truth) > 0.1


@every_export
def test_every_target_is_found_by_name(name, exporter, export):
    given = export(name, exporter)
    adapter = load(given.adapter)
    assert len(adapter) == given.targets
    found = open_base(given.model).resolve(adapter, Hints()).require().targets
    assert found.keys() == adapter.keys()
    rung = {"torchscript": "node_name", "dynamo": "name_scopes"}[exporter]
    assert all(any(said.startswith(rung) for said in places[0].evidence) for places in found.values())
    calls = {key: [(place.node, place.weight) for place in places] for key, places in found.items()}
    assert len({node for nodes in calls.values() for node in nodes}) == sum(map(len, calls.values()))
    assert {key for key, nodes in calls.items() if len(nodes) > 1} <= {"called_twice.weight"}


@every_export
@both_verbs
def test_the_changed_model_gives_the_outputs_of_peft(name, exporter, verb, export, tmp_path):
    given, out = export(name, exporter), tmp_path / "out.onnx"
    VERBS[verb](load(given.adapter), open_base(given.model), out)
    onnx.checker.check_model(out, full_check=True)
    for optimise in (True, False):
        assert relative_error(outputs(out, given, optimise=optimise), given.truth) <= 1e-5


@every_export
def test_attach_keeps_every_weight_byte_for_byte(name, exporter, export, tmp_path):
    given = export(name, exporter)
    before = {path.name: path.read_bytes() for path in given.model.parent.iterdir() if path.is_file()}
    attach(load(given.adapter), open_base(given.model), tmp_path / "out.onnx")
    old, new = stored(given.model), stored(tmp_path / "out.onnx")
    assert {name: new[name].tobytes() for name in old} == {name: values.tobytes() for name, values in old.items()}
    assert all(added.startswith("lora/") for added in new.keys() - old.keys())
    assert {path.name: path.read_bytes() for path in given.model.parent.iterdir() if path.is_file()} == before


@every_export
def test_a_true_merge_is_verified(name, exporter, export, tmp_path):
    given, out = export(name, exporter), tmp_path / "out.onnx"
    adapter = load(given.adapter)
    merge(adapter, open_base(given.model), out)
    verdict = verify(open_base(given.model), adapter, open_base(out))
    assert (verdict.problems, verdict.touched.keys()) == ([], adapter.keys())


def test_the_head_alone_changes_where_it_is_tied_to_the_embedding(export, tmp_path):
    given, out = export("llama-tied", "dynamo"), tmp_path / "out.onnx"
    adapter = load(given.adapter)
    merge(Adapter({"lm_head.weight": adapter["lm_head.weight"]}), open_base(given.model), out)
    gathers = [n for n in onnx.load(out, load_external_data=False).graph.node if n.op_type == "Gather"]
    table = next(n.input[0] for n in gathers if n.input[0] in stored(given.model))
    assert stored(out)[table].tobytes() == stored(given.model)[table].tobytes()
    assert relative_error(outputs(out, given), outputs(given.model, given)) > 0.01


def turned(update):
    """ΔW transposed: fits a square weight, and is wrong."""
    part = update["lora"]
    return Update((replace(part, lora_A=part.lora_B.T.copy(), lora_B=part.lora_A.T.copy()),))


def without_the_root(update):
    return Update((replace(update["lora"], scale_rule="alpha/r"),))


WRONG = {
    "rsLoRA was ignored": lambda adapter: {key: without_the_root(update) for key, update in adapter.items()},
    "one square ΔW is transposed": lambda adapter: {**adapter, SQUARE: turned(adapter[SQUARE])},
    "one target is missing": lambda adapter: {key: update for key, update in adapter.items() if key != SQUARE},
}
SQUARE = "encoder.layer.1.attention.self.key.weight"


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_merge_is_not_verified(spoil, exporter, export, tmp_path):
    given, out = export("bert", exporter), tmp_path / "out.onnx"
    adapter = load(given.adapter)
    assert isinstance(adapter[SQUARE]["lora"], Lora)
    merge(Adapter(spoil(adapter)), open_base(given.model), out)
    problems = verify(open_base(given.model), adapter, open_base(out)).problems
    assert SQUARE in {problem.where for problem in problems}
    assert {problem.rule for problem in problems} == {"LF-611"}
    assert relative_error(outputs(out, given), given.truth) > 1e-3


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_base_itself_is_not_verified(exporter, export):
    given = export("bert", exporter)
    adapter, base = load(given.adapter), open_base(given.model)
    assert {problem.where for problem in verify(base, adapter, base).problems} == adapter.keys()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_an_adapter_merged_twice_is_not_verified(exporter, export, tmp_path):
    given = export("bert", exporter)
    adapter = load(given.adapter)
    merge(adapter, open_base(given.model), tmp_path / "once.onnx")
    merge(adapter, open_base(tmp_path / "once.onnx"), tmp_path / "twice.onnx")
    problems = verify(open_base(given.model), adapter, open_base(tmp_path / "twice.onnx")).problems
    assert {problem.where for problem in problems} == adapter.keys()
    assert all("twice" in problem.what for problem in problems)
