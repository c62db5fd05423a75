"""The pages beside the README tell the truth too: links lead somewhere, tables are those of the code."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from loraformat.cli.main import _VERBS, cli
from loraformat_converters.onnx.attaching.branches import FORMS
from loraformat_converters.onnx.changing import record

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *ROOT.glob("examples/*/README.md"), *DOCS.glob("*.md"), *ROOT.glob("spec/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        if "://" in name:
            continue
        found = (page.parent / name) if name else page
        assert found.exists(), target
        titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        spelled = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]
        assert not heading or heading in spelled, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_an_option_that_a_page_names_exists(page):
    commands = [cli.get_command(click.Context(cli), verb) for verb in _VERBS]
    known = {name for command in commands for parameter in command.params for name in parameter.opts}
    said = re.sub(r"(?m)^\$ .*$", "", page.read_text(encoding="utf-8"))  # commands may be others'
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", said)) <= known


COMMANDS = [
    line.removeprefix("$ loraformat ").partition("  #")[0]
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith("$ loraformat ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_on_a_page_is_understood(line):
    verb, *words = shlex.split(line)
    command = cli.get_command(click.Context(cli), verb)
    assert command.make_context(verb, words)  # and every option that it requires is there


def test_the_page_of_errors_is_the_table_of_rules():
    assert (DOCS / "errors.md").read_text(encoding="utf-8") == runpy.run_path(str(DOCS / "errors.py"))["page"]()


def test_the_page_of_graphs_names_every_operator_that_has_a_branch_and_what_the_code_calls_things():
    text = (DOCS / "onnx.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`([^`\n]+)`", text)) | {"MatMul"}
    assert {name.rpartition(".")[2] for name in FORMS} <= said
    assert {record.ATTACHED, record.BASE, "detach", "extract"} <= said
    assert {word for word in said if word in _VERBS or word.startswith("--")} >= {"--inline", "--plan", "--verify"}
