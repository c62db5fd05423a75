"""The two readers agree on files that neither was written for: vectors with random mistakes, seeds fixed."""

import copy
import json
import random
import subprocess
import sys

import pytest
from test_conformance import SERVER, SPEC, node

VECTORS = SPEC / "vectors"
INDEX = json.loads((VECTORS / "index.json").read_text(encoding="utf-8"))
READABLE = [VECTORS / v["path"] for v in INDEX["vectors"] if v["verdict"] != "error"]

VALUES = (
    *(None, True, 0, 1, 2, 3, 7, -1, 2.5, 1.0, 1e39, 2**53 + 1, "", "x", "1.5", "2.0", "alpha/r", "factor", "resize"),
    *("lora", "loha", "lokr", "delta", "magnitude", "rows", "replace"),
    *([], [0], [1], [0, 1], [1, 0], [-1], [[]], [None], {}, {"a": 1}),
)
NAMES = (
    "r",
    "eps",
    "axis",
    "shape",
    "axes",
    "op",
    "requires",
    "components",
    "allows",
    "magnitude_axes",
    "kind",
    "other",
)
TOKENS = (
    *'{}[]",:0123456789.eE+-\\ \n\x00\x7f\u2028',
    "\\u00e9",
    "\\ud83d\\ude00",
    "\\ud800",
    "null",
    "1E400",
    "-0",
    "00",
)


class Reader:
    """An implementation behind the protocol."""

    def __init__(self, *command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def rules(self, path, severity):
        problems = self.ask(op="validate", path=str(path))["problems"]
        return {problem["rule"] for problem in problems if problem["severity"] == severity}


@pytest.fixture(scope="module")
def readers():
    both = Reader(sys.executable, SERVER), Reader(node(), SPEC / "conformance" / "reader.mjs")
    yield both
    for reader in both:
        reader.process.stdin.close()
        reader.process.wait(timeout=30)


def places(tree, found):
    """Every (list or object, index or key) in a JSON value."""
    for place in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, place))
        if isinstance(tree[place], dict | list):
            places(tree[place], found)
    return found


def mistaken(tree, draw):
    """The JSON value with a member left out, added, renamed, shifted by one, or of another value."""
    tree = copy.deepcopy(tree)
    parent, place = draw.choice(places(tree, []) or [(tree, "other")])
    match draw.randrange(5):
        case 0:
            parent.pop(place) if place != "other" else None
        case 1 if isinstance(parent, dict):
            parent[draw.choice(NAMES)] = draw.choice(VALUES)
        case 2 if isinstance(parent, dict) and place in parent:
            parent[draw.choice([f"{place}x", f"unet:{place}", f"{place}.lora_A", "e\u0301", ""])] = parent.pop(place)
        case 3 if type(parent[place]) in (int, float):
            parent[place] += draw.choice([1, -1, 0.5])
        case _:
            parent[place] = draw.choice(VALUES)
    return tree


def misspelt(text, draw):
    """The text with a token put in, put over another, or a character left out."""
    at = draw.randrange(len(text))
    put = draw.choice([*TOKENS, ""])
    return text[:at] + put + text[at + draw.randrange(2) :]


def with_mistakes(path, draw):
    """The bytes of a file with one to three mistakes in its metadata or its header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    value = json.loads(header.pop("__metadata__")["loraformat"])
    for _ in range(draw.randrange(3)):
        if draw.random() < 0.8 or not header:
            value = mistaken(value, draw)
        else:
            header = mistaken(header, draw)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    if draw.random() < 0.4:
        text = misspelt(text, draw)
    spelled = json.dumps({"__metadata__": {"loraformat": text}, **header}, ensure_ascii=False)
    if draw.random() < 0.1:
        spelled = misspelt(spelled, draw)
    return len(spelled.encode()).to_bytes(8, "little") + spelled.encode() + data[start:]


@pytest.mark.parametrize("seed", range(4))
def test_two_readers_agree_on_files_with_mistakes(seed, readers, tmp_path):
    ours, theirs = readers
    draw, path, verdicts = random.Random(seed), tmp_path / "a.safetensors", set()
    for _ in range(200):
        path.write_bytes(with_mistakes(draw.choice(READABLE), draw))
        broken, first = ours.rules(path, "error"), theirs.rules(path, "error")
        assert first <= broken, path.read_bytes()  # theirs stops at its first error
        assert bool(first) == bool(broken), path.read_bytes()
        if not broken:
            assert ours.rules(path, "warning") == theirs.rules(path, "warning"), path.read_bytes()
            digest = ours.ask(op="digest", path=str(path))
            assert digest == theirs.ask(op="digest", path=str(path)), path.read_bytes()
        verdicts |= broken or {"valid"}
    assert "valid" in verdicts
    assert len(verdicts) > 15
