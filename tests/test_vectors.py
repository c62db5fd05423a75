"""The package against the vectors of the specification: a valid one means what it must, any other breaks its rule."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from safetensors import deserialize

from loraformat import file
from loraformat.container import Container
from loraformat.errors import LoraFormatError
from loraformat.identity import digest, tensor_sha256
from loraformat.likeness import unlike
from loraformat.placing import place
from loraformat.rules import RULES
from loraformat.sketch import sketch
from loraformat.values import value_problems

SPEC = Path(__file__).parents[1] / "spec"
VECTORS = SPEC / "vectors"
INDEX = json.loads((VECTORS / "index.json").read_text(encoding="utf-8"))
SCHEMA = Draft202012Validator(json.loads((SPEC / "loraformat.schema.json").read_text(encoding="utf-8")))
FILE_RULES = {rule.id for rule in RULES.values() if rule.of_file}


def each(*verdicts):
    entries = [v for v in INDEX["vectors"] if v["verdict"] in verdicts]
    ids = [Path(v["path"]).stem for v in entries]
    return pytest.mark.parametrize("vector", entries, ids=ids)


each_readable = each("valid", "warning")
each_valid = each("valid")
each_broken = each("warning", "error")


def expected_of(vector):
    return dict(Container(VECTORS / vector["expected"]))


def assert_close(got, wanted):
    assert got.shape == wanted.shape
    assert got.dtype == np.float32
    assert np.linalg.norm(got.astype(np.float64) - wanted) <= 1e-6 * np.linalg.norm(wanted.astype(np.float64))


def reported(path):
    """Every problem that a validator reports."""
    try:
        adapter, problems = file.read(path)
    except LoraFormatError as error:
        return error.problems
    return [*problems, *value_problems(adapter)]


# The index.


def test_the_index_conforms_to_its_schema():
    schema = json.loads((VECTORS / "index.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(INDEX)


def test_the_index_lists_every_file():
    listed = {path for v in INDEX["vectors"] for path in (v["path"], v.get("expected")) if path}
    assert listed == {str(p.relative_to(VECTORS)) for p in VECTORS.glob("*/*.safetensors")}


def test_every_file_rule_is_broken_by_a_vector():
    assert {rule for v in INDEX["vectors"] if v["verdict"] != "valid" for rule in v["rules"]} == FILE_RULES


def test_every_error_rule_is_narrowly_kept_by_a_valid_vector():
    kept = {rule for v in INDEX["vectors"] if v["verdict"] == "valid" for rule in v["rules"]}
    assert kept == {rule for rule in FILE_RULES if rule != "LF-204"}  # every valid file keeps it alike


def test_a_verdict_is_the_severity_of_its_rule():
    for vector in INDEX["vectors"]:
        if vector["verdict"] != "valid":
            assert [RULES[rule].severity for rule in vector["rules"]] == [vector["verdict"]]


def test_the_refusals_name_rules_of_readers():
    assert {refusal["rule"] for refusal in INDEX["refusals"]} <= RULES.keys() - FILE_RULES


def test_the_vectors_are_what_their_maker_writes():
    done = subprocess.run([sys.executable, VECTORS / "make.py", "--check"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_maker_of_the_vectors_does_not_import_the_package():
    lines = [line for path in VECTORS.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if line.lstrip().startswith(("from loraformat", "import loraformat"))]


# Valid and warned vectors.


@each_readable
def test_a_readable_vector_opens_in_the_reference_reader(vector):
    header = dict(deserialize((VECTORS / vector["path"]).read_bytes()))
    assert header.keys() == dict(Container(VECTORS / vector["path"])).keys()


@each_valid
def test_a_valid_vector_reads_without_a_word(vector):
    allowed = set() if vector["canonical"] else {"LF-207"}
    assert {p.rule for p in reported(VECTORS / vector["path"])} <= allowed


@each_readable
def test_a_readable_vector_means_what_the_formulas_of_the_specification_give(vector):
    adapter, _ = file.read(VECTORS / vector["path"])
    expected = expected_of(vector)
    assert expected
    for name, wanted in expected.items():
        what, _, key = name.partition(".")
        update, base = adapter[key], expected.get(f"base.{key}")
        match what:
            case "matrix":
                assert_close(update.matrix(), wanted)
            case "delta":
                assert_close(update.delta(base), wanted)
            case "result":
                assert_close(update.apply(base), wanted)


@each_valid
def test_a_valid_vector_means_the_same_row_by_row(vector):
    adapter, _ = file.read(VECTORS / vector["path"])
    expected = expected_of(vector)
    for name, wanted in expected.items():
        what, _, key = name.partition(".")
        update, base = adapter[key], expected.get(f"base.{key}")
        if what not in ("delta", "result") or not update.tileable or wanted.ndim == 0:
            continue
        for rows in ((0, 1), (1, wanted.shape[0]), (wanted.shape[0] // 2, wanted.shape[0] // 2 + 1)):
            tile = None if base is None else base[slice(*rows)]
            got = update.delta(tile, rows) if what == "delta" else update.apply(tile, rows)
            # A tile of a difference may be nearly zero: its error is measured against the whole.
            assert np.linalg.norm(got.astype(np.float64) - wanted[slice(*rows)]) <= 1e-6 * np.linalg.norm(
                wanted.astype(np.float64)
            )


@each_readable
def test_a_readable_vector_has_the_digest_that_was_computed_beside_the_package(vector):
    assert digest(file.read(VECTORS / vector["path"])[0]) == vector["digest"]


@each_readable
def test_a_readable_vector_saved_again_is_the_same_file_if_it_is_canonical(vector, tmp_path):
    adapter, _ = file.read(VECTORS / vector["path"])
    file.save(adapter, tmp_path / "again.safetensors")
    same = (tmp_path / "again.safetensors").read_bytes() == (VECTORS / vector["path"]).read_bytes()
    assert same == vector["canonical"]


@each_readable
def test_a_readable_vector_conforms_to_the_schema(vector):
    SCHEMA.validate(json.loads(Container(VECTORS / vector["path"]).metadata["loraformat"]))


def test_stated_defaults_keep_the_digest(tmp_path):
    adapter, _ = file.read(VECTORS / "valid" / "stated_defaults.safetensors")
    file.save(adapter, tmp_path / "plain.safetensors")
    assert digest(file.read(tmp_path / "plain.safetensors")[0]) == digest(adapter)


# Warned and invalid vectors.


@each_broken
def test_a_broken_vector_breaks_its_rule_and_no_other(vector):
    problems = reported(VECTORS / vector["path"])
    assert {(p.rule, p.severity) for p in problems} == {(vector["rules"][0], vector["verdict"])}
    assert any(vector["where"] in p.where for p in problems)


@each_broken
def test_the_schema_refuses_what_the_index_says_it_refuses(vector):
    if vector["rules"] < ["LF-202"] or (vector["rules"] == ["LF-202"] and not vector["schema"]):
        assert not vector["schema"]  # there is no value to check
        return
    value = json.loads(Container(VECTORS / vector["path"]).metadata["loraformat"])
    assert SCHEMA.is_valid(value) != vector["schema"]


# Refusals.


@pytest.mark.parametrize("refusal", [pytest.param(r, id=r["title"]) for r in INDEX["refusals"]])
def test_a_base_that_does_not_fit_is_refused(refusal):
    update = file.read(VECTORS / refusal["path"])[0][refusal["key"]]
    base = refusal["base"] and np.array(refusal["base"]["values"], np.float32).reshape(refusal["base"]["shape"])
    if refusal["rule"] in ("LF-607", "LF-616"):  # which tensor it is, is asked by who opens the base: see test_cli
        drawn = sketch(base, update.placement)
        if update.sketch is not None and update.base_sha256 is None:
            assert unlike(refusal["key"], update.sketch, drawn, "it").rule == refusal["rule"]
        else:
            assert tensor_sha256(base) != update.base_sha256
        return
    with pytest.raises(LoraFormatError) as caught:
        update.apply(base)
    assert [p.rule for p in caught.value.problems] == [refusal["rule"]]


def test_rows_beyond_the_base_are_refused_before_anything_is_applied():
    update = file.read(VECTORS / "valid" / "rows_unplaced.safetensors")[0]["wte.weight"]
    assert place("wte.weight", update, (9, 6), None, [])[0].shape == (9, 6)
    with pytest.raises(LoraFormatError, match="LF-606"):
        place("wte.weight", update, (8, 6), None, [])
