"""What is made once and used by many tests."""

from __future__ import annotations

import json
import os
import sys

import pytest
from hypothesis import settings

# The same examples in every run; a slow machine is no failure.
settings.register_profile("here", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("here")


def pytest_ignore_collect(collection_path, config):
    """Where the peers are left out, a file that is theirs alone is not even imported: a framework takes seconds to."""
    if "not peer" in config.option.markexpr and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.peer\n" in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_sessionfinish(session):
    """Where LORAFORMAT_CI is set, a skipped test is a failure: there, everything can be installed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("LORAFORMAT_CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """(model, exporter) → ``exports.Export``, made the first time it is asked for."""
    exports = pytest.importorskip("exports", reason="needs the peers: torch, transformers, peft, onnxscript")
    made = {}

    def get(name, exporter):
        if (name, exporter) not in made:
            made[name, exporter] = exports.export(name, exporter, tmp_path_factory.mktemp(f"{name}-{exporter}"))
        return made[name, exporter]

    return get


class Result:
    """What a run left: exit code, stdout, stderr."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run ``loraformat`` with these words in an empty folder, as the installed script does."""
    from loraformat.cli.main import main

    monkeypatch.chdir(tmp_path)

    def runner(*words):
        monkeypatch.setattr(sys, "argv", ["loraformat", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return Result(caught.value.code, out, err)

    return runner
