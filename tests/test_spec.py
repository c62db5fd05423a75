"""The specification holds together: prose, schema, rules and vectors name the same ids and tell the same story."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rfc8785
from jsonschema import Draft202012Validator

from loraformat import file
from loraformat.container import Container
from loraformat.errors import LoraFormatError
from loraformat.identity import digest
from loraformat.names import NAME_SPACES, ROLES
from loraformat.parts import KINDS
from loraformat.rules import RULES
from loraformat.scale import SCALE_RULES
from loraformat.values import value_problems

SPEC = Path(__file__).parents[1] / "spec"
PROSE = (SPEC / "loraformat.md").read_text(encoding="utf-8")
SCHEMA = json.loads((SPEC / "loraformat.schema.json").read_text(encoding="utf-8"))
VECTORS = SPEC / "vectors"
VALID = [json.loads(p.read_text()) | {"name": p.stem} for p in sorted((VECTORS / "valid").glob("*.json"))]
INVALID = json.loads((VECTORS / "invalid" / "index.json").read_text())
FILE_RULES = {rule.id for rule in RULES.values() if rule.of_file}


def ids(text):
    return set(re.findall(r"LF-\d{3}", text))


def marked(word):
    """The fenced JSON examples of the prose that are marked with ``word``."""
    return re.findall(rf"^```json {word}\n(.*?)^```$", PROSE, flags=re.MULTILINE | re.DOTALL)


def validator(definition=""):
    part = {"$schema": SCHEMA["$schema"], "$defs": SCHEMA["$defs"], "$ref": f"#/$defs/{definition}"}
    return Draft202012Validator(part if definition else SCHEMA)


def path_of(vector):
    return VECTORS / "valid" / f"{vector['name']}.safetensors"


def expected_of(vector):
    return dict(Container(VECTORS / "valid" / f"{vector['name']}.expected.safetensors"))


def by_name(vector):
    return vector.get("name") or vector["file"].removesuffix(".safetensors")


def assert_close(got, wanted):
    assert got.shape == wanted.shape
    assert got.dtype == np.float32
    assert np.linalg.norm(got.astype(np.float64) - wanted) <= 1e-6 * np.linalg.norm(wanted.astype(np.float64))


def each(vectors):
    return pytest.mark.parametrize("vector", [pytest.param(v, id=by_name(v)) for v in vectors])


each_valid = each(VALID)
each_invalid_value = each([v for v in INVALID if v["rule"] > "LF-202" or v["schema"]])
each_report = each(INVALID)


# One set of rules.


def test_the_prose_states_every_file_rule_and_no_other():
    stated = set(re.findall(r"^\| (LF-\d{3}) \|", PROSE, flags=re.MULTILINE))
    assert stated == FILE_RULES


def test_the_prose_names_only_rules_that_exist():
    assert ids(PROSE) <= RULES.keys()


def test_the_table_of_rules_gives_each_its_severity_and_its_words():
    rows = dict(re.findall(r"^\| (LF-\d{3}) \| ([^|]+\|[^|]+) \|", PROSE, flags=re.MULTILINE))
    assert {rule: [cell.strip() for cell in row.split("|")] for rule, row in rows.items()} == {
        rule: [RULES[rule].severity, RULES[rule].title.replace("<", "\\<")] for rule in FILE_RULES
    }


def test_every_must_ends_with_its_rule():
    text = re.sub(r"^```.*?^```$", "", PROSE, flags=re.MULTILINE | re.DOTALL)
    body = text[text.index("## 3") :]
    sentences = re.split(r"(?<=[.\]])\s+(?=[A-Z*|`#-])|\n\n|\n(?=[|#-])|\|", body)
    duties = [s for s in sentences if re.search(r"\bMUST\b", s)]
    assert duties
    assert [s for s in duties if not re.search(r"\[LF-\d{3}(, LF-\d{3})*\]", s)] == []


def test_every_file_rule_is_broken_by_a_vector():
    assert {vector["rule"] for vector in INVALID} == FILE_RULES


def test_the_index_lists_exactly_the_invalid_files():
    assert sorted(v["file"] for v in INVALID) == sorted(p.name for p in (VECTORS / "invalid").glob("*.safetensors"))


def test_the_schema_names_the_rules_that_it_checks():
    assert ids(json.dumps(SCHEMA)) == {vector["rule"] for vector in INVALID if vector["schema"]}


def test_the_tables_of_names_are_those_of_the_package():
    tables = {
        word: set(re.findall(r"`([^`]+)`", " ".join(re.findall(rf"^\| `?{word}`? \|(.*)$", PROSE, flags=re.MULTILINE))))
        for word in ("name spaces", "kinds", "roles", "scale rules")
    }
    assert tables == {
        "name spaces": set(NAME_SPACES),
        "kinds": set(KINDS),
        "roles": set(ROLES),
        "scale rules": set(SCALE_RULES),
    }


# Valid vectors.


@each_valid
def test_a_valid_vector_reads_without_a_word(vector):
    adapter, problems = file.read(path_of(vector))
    assert [p for p in problems if vector["canonical"]] == []
    assert {p.rule for p in problems} <= {"LF-207"}
    assert (len(adapter), adapter.names) == (vector["targets"], vector["names"])


@each_valid
def test_a_valid_vector_means_what_the_formulas_of_the_specification_give(vector):
    adapter, _ = file.read(path_of(vector))
    expected = expected_of(vector)
    assert expected or vector["targets"] == 0
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
    adapter, _ = file.read(path_of(vector))
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
            assert np.linalg.norm(got - wanted[slice(*rows)]) <= 1e-6 * np.linalg.norm(wanted)


@each_valid
def test_a_valid_vector_has_the_digest_that_was_computed_beside_the_package(vector):
    assert digest(file.read(path_of(vector))[0]) == vector["digest"]


@each_valid
def test_a_valid_vector_saved_again_is_the_same_file(vector, tmp_path):
    adapter, _ = file.read(path_of(vector))
    file.save(adapter, tmp_path / "again.safetensors")
    same = (tmp_path / "again.safetensors").read_bytes() == path_of(vector).read_bytes()
    assert same == vector["canonical"]


@each_valid
def test_a_valid_vector_conforms_to_the_schema(vector):
    validator().validate(json.loads(Container(path_of(vector)).metadata["loraformat"]))


def test_stated_defaults_keep_the_digest(tmp_path):
    adapter, _ = file.read(VECTORS / "valid" / "stated_defaults.safetensors")
    file.save(adapter, tmp_path / "plain.safetensors")
    assert digest(file.read(tmp_path / "plain.safetensors")[0]) == digest(adapter)


# Invalid vectors.


def reported(path):
    try:
        adapter, problems = file.read(path)
    except LoraFormatError as error:
        return error.problems
    return [*problems, *value_problems(adapter)]


@each_report
def test_an_invalid_vector_breaks_its_rule_and_no_other(vector):
    problems = reported(VECTORS / "invalid" / vector["file"])
    assert {(p.rule, p.severity) for p in problems} == {(vector["rule"], vector["severity"])}
    assert any(vector["where"] in p.where for p in problems)


@each_invalid_value
def test_the_schema_refuses_what_the_index_says_it_refuses(vector):
    value = json.loads(Container(VECTORS / "invalid" / vector["file"]).metadata["loraformat"])
    assert validator().is_valid(value) != vector["schema"]


# Examples.


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("word", "definition"), [("example", ""), ("target", "target"), ("part", "part")])
def test_every_marked_example_conforms(word, definition):
    assert marked(word)
    for text in marked(word):
        validator(definition).validate(json.loads(text))


def test_the_file_that_the_prose_shows_is_the_smallest_vector():
    data = (VECTORS / "valid" / "smallest.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    shown = re.search(r"^```text header\n(.*?)^```$", PROSE, flags=re.MULTILINE | re.DOTALL)[1]
    assert shown.replace("\n", "") == data[8 : 8 + length].decode().rstrip()
    value = json.loads(Container(VECTORS / "valid" / "smallest.safetensors").metadata["loraformat"])
    assert json.loads(marked("example")[0]) == value
    assert data[:8].hex(" ") in PROSE
    assert f"{len(data)} bytes" in PROSE


def test_the_digest_that_the_prose_shows_is_the_one_of_the_json_that_it_shows():
    shown = json.loads(re.search(r"^```json\n(.*?)^```$", PROSE, flags=re.MULTILINE | re.DOTALL)[1])
    shown_digest = hashlib.sha256(rfc8785.dumps(shown)).hexdigest()
    assert shown_digest == digest(file.read(VECTORS / "valid" / "smallest.safetensors")[0])
    assert shown_digest in PROSE


def test_the_vectors_are_what_their_maker_writes():
    done = subprocess.run([sys.executable, VECTORS / "make.py", "--check"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_maker_of_the_vectors_does_not_import_the_package():
    sources = [path.read_text(encoding="utf-8") for path in VECTORS.glob("*.py")]
    assert not [s for s in sources if re.search(r"^\s*(from|import) loraformat", s, flags=re.MULTILINE)]
