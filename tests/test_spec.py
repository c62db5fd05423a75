"""The specification holds together: prose, schema, rules and vectors name the same ids and tell the same story."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import rfc8785
from jsonschema import Draft202012Validator

from loraformat import file
from loraformat.container import Container
from loraformat.errors import LoraFormatError
from loraformat.identity import digest
from loraformat.metadata import PART_FIELDS, TARGET_FIELDS, TOP_FIELDS
from loraformat.names import NAME_SPACES, ROLES
from loraformat.parse import parse
from loraformat.parts import ADDITIVE, KINDS
from loraformat.rules import RULES
from loraformat.scale import SCALE_RULES

SPEC = Path(__file__).parents[1] / "spec"
PROSE = (SPEC / "loraformat.md").read_text(encoding="utf-8")
SCHEMA = json.loads((SPEC / "loraformat.schema.json").read_text(encoding="utf-8"))
VECTORS = SPEC / "vectors"
INDEX = json.loads((VECTORS / "index.json").read_text(encoding="utf-8"))
FILE_RULES = {rule.id for rule in RULES.values() if rule.of_file}


def ids(text):
    return set(re.findall(r"LF-\d{3}", text))


def marked(word):
    """The fenced JSON examples of the prose that are marked with ``word``."""
    return re.findall(rf"^```json {word}\n(.*?)^```$", PROSE, flags=re.MULTILINE | re.DOTALL)


def validator(definition=""):
    part = {"$schema": SCHEMA["$schema"], "$defs": SCHEMA["$defs"], "$ref": f"#/$defs/{definition}"}
    return Draft202012Validator(part if definition else SCHEMA)


# One set of rules.


def table_of_rules():
    """Rule → [class, severity, text, reason] of section 15."""
    rows = re.findall(r"^\| (LF-\d{3}) \| (.*) \|$", PROSE, flags=re.MULTILINE)
    return {rule: row.split(" | ") for rule, row in rows}


def test_prose_rules_and_vectors_name_the_same_file_rules():
    of_file = {rule for rule, row in table_of_rules().items() if row[0] == "file"}
    broken = {rule for v in INDEX["vectors"] if v["verdict"] != "valid" for rule in v["rules"]}
    assert of_file == FILE_RULES == broken


def test_prose_and_refusals_name_rules_of_readers_that_exist():
    of_readers = {rule for rule, row in table_of_rules().items() if row[0] == "reader"}
    assert {refusal["rule"] for refusal in INDEX["refusals"]} <= of_readers <= RULES.keys() - FILE_RULES


def test_every_rule_that_the_prose_names_is_in_its_table_and_every_one_of_the_table_in_a_duty():
    before, _, _ = PROSE.partition("## 15")
    assert ids(PROSE) == table_of_rules().keys()
    assert ids(before) == table_of_rules().keys()


def test_the_table_of_rules_gives_each_its_severity_and_its_words_and_a_reason():
    for rule, (_, severity, text, reason) in table_of_rules().items():
        assert (severity, text) == (RULES[rule].severity, RULES[rule].title.replace("<", "\\<"))
        assert reason


def test_every_must_ends_with_its_rule():
    text = re.sub(r"^```.*?^```$", "", PROSE, flags=re.MULTILINE | re.DOTALL)
    body = text[text.index("## 3") :]
    sentences = re.split(r"(?<=[.\]])\s+(?=[A-Z*|`#-])|\n\n|\n(?=[|#-])|\|", body)
    duties = [s for s in sentences if re.search(r"\bMUST\b", s)]
    assert duties
    assert [s for s in duties if not re.search(r"\[LF-\d{3}(, LF-\d{3})*\]", s)] == []


def test_the_schema_names_the_rules_that_it_checks():
    assert ids(json.dumps(SCHEMA)) == {rule for v in INDEX["vectors"] if v.get("schema") for rule in v["rules"]}


def test_the_tables_of_names_are_those_of_the_package():
    tables = {
        word: set(re.findall(r"`([^`]+)`", " ".join(re.findall(rf"^\| `?{word}`? \|(.*)$", PROSE, flags=re.MULTILINE))))
        for word in ("name spaces", "kinds", "additive kinds", "roles", "scale rules")
    }
    assert tables == {
        "name spaces": set(NAME_SPACES),
        "kinds": set(KINDS),
        "additive kinds": set(ADDITIVE),
        "roles": set(ROLES),
        "scale rules": set(SCALE_RULES),
    }


# Examples.


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("word", "definition"), [("example", ""), ("target", "target"), ("part", "part")])
def test_every_marked_example_conforms(word, definition):
    assert marked(word)
    for text in marked(word):
        validator(definition).validate(json.loads(text))


def test_every_fenced_example_is_one_that_a_test_knows():
    known = {"text header", "json example", "json target", "json part", "json digest", "json refused LF-206"}
    assert set(re.findall(r"^```(.+)$", PROSE, flags=re.MULTILINE)) == known | {"abnf", "jsonl protocol"}


def fields_with_examples():
    """(table, field, example) of the three tables of fields."""
    table = PROSE[PROSE.index("## 5") : PROSE.index("Required fields")]
    tables = dict(
        zip(("top", "target", "part"), re.split(r"^A (?:target|part):$", table, flags=re.MULTILINE), strict=True)
    )
    for name, text in tables.items():
        for row in re.findall(r"^\| `(\w+)` \|(.*)\|$", text, flags=re.MULTILINE):
            cells = [cell.strip() for cell in row[1].split("|")]
            if cells[-1].startswith("`"):
                yield name, row[0], cells[1], json.loads(cells[-1].strip("`"))


@pytest.mark.parametrize(("table", "field", "of", "example"), list(fields_with_examples()))
def test_the_example_of_every_field_conforms(table, field, of, example):
    pair = {"kind": "lora", "alpha": 1, "scale_rule": "factor"}
    match table:
        case "top":
            validator().validate(
                {"version": "1.0", "names": "mlx", "targets": {"w": {"parts": [pair]}}, field: example}
            )
        case "target":
            placed = {"shape": [2, 3], "axes": {"out": [0], "in": [1]}}
            validator("target").validate({"parts": [pair], **placed, field: example})
        case "part":
            known = KINDS.get(of) and {"kind": of}
            validator("part").validate((known or pair) | {field: example})
    listed = {"top": TOP_FIELDS, "target": TARGET_FIELDS, "part": {f for kind in PART_FIELDS.values() for f in kind}}
    assert field in listed[table]


def test_the_tables_of_fields_are_those_of_the_package():
    table = PROSE[PROSE.index("## 5") : PROSE.index("Required fields")]
    listed = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted([*TOP_FIELDS, *TARGET_FIELDS, *{f for kind in PART_FIELDS.values() for f in kind}])


def test_the_examples_break_no_rule_that_needs_no_tensors():
    for text in marked("example"):
        with pytest.raises(LoraFormatError) as caught:
            parse(rfc8785.dumps(json.loads(text)).decode(), {})
        assert {problem.rule for problem in caught.value.problems} == {"LF-303"}  # the tensors are not shown


def test_the_example_that_is_refused_is_refused_by_its_rule_alone():
    with pytest.raises(LoraFormatError) as caught:
        parse(marked("refused LF-206")[0], {})
    assert {p.rule for p in caught.value.problems if p.severity == "error"} == {"LF-206"}


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
    shown = json.loads(marked("digest")[0])
    shown_digest = hashlib.sha256(rfc8785.dumps(shown)).hexdigest()
    assert shown_digest == digest(file.read(VECTORS / "valid" / "smallest.safetensors")[0])
    assert shown_digest in PROSE
