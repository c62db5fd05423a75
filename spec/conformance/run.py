"""Check any implementation of loraformat against every vector: ``python run.py [--class C]… [--only OP]… COMMAND…``.

COMMAND reads a JSON request a line and writes a JSON reply a line (appendix B of ``spec/loraformat.md``). Without
``--class`` an operation that it does not know is no fault; with it, the operations of these classes (reader, writer,
validator) have to be known. Prints a table; exits 1 on a miss. Needs Python and numpy, and nothing of loraformat.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
CLASSES = {"reader": ("matrix", "apply"), "writer": ("digest", "roundtrip"), "validator": ("validate",)}
OPERATIONS = ("validate", "matrix", "apply", "digest", "sketch", "roundtrip")
TOLERANCE = 1e-6


class Implementation:
    """The command, asked one question at a time."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to a request; EOFError where none comes."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(json.dumps(request)[:200])
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


@dataclass
class Score:
    """What became of one operation."""

    passed: int = 0
    unknown: int = 0
    misses: list[str] = field(default_factory=list)


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The float32 tensors of a file of expected values."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: np.frombuffer(data[start:][slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def asked(array: np.ndarray[Any, Any] | None) -> dict[str, Any] | None:
    """A tensor as a request holds it."""
    return None if array is None else {"shape": list(array.shape), "values": array.reshape(-1).tolist()}


def close(reply: dict[str, Any], wanted: np.ndarray[Any, Any]) -> bool:
    """Whether the numbers are those that were expected, within the tolerance of section 8.5."""
    if reply.get("shape") != list(wanted.shape):
        return False
    difference = np.array(reply["values"], np.float64) - wanted.reshape(-1).astype(np.float64)
    return bool(np.linalg.norm(difference) <= TOLERANCE * np.linalg.norm(wanted.astype(np.float64)))


def questions(index: dict[str, Any], folder: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every request, with what its reply has to satisfy: a dict that it equals, or an array that it is close to."""
    for vector in index["vectors"]:
        path, verdict = str(VECTORS / vector["path"]), vector["verdict"]
        broken = [] if verdict == "valid" else [(vector["rules"][0], verdict, vector["where"])]
        yield {"op": "validate", "path": path}, (broken, verdict == "valid" and not vector["canonical"])
        if verdict == "error":
            continue
        yield {"op": "digest", "path": path}, {"digest": vector["digest"]}
        yield {"op": "roundtrip", "path": path, "out": str(folder / "out.safetensors")}, vector
        expected = tensors(VECTORS / vector["expected"])
        for name, wanted in expected.items():
            what, _, key = name.partition(".")
            base = asked(expected.get(f"base.{key}"))
            if what == "matrix":
                yield {"op": "matrix", "path": path, "key": key}, wanted
            elif what == "result":
                yield {"op": "apply", "path": path, "key": key, "base": base}, wanted
            elif what == "sketch":
                yield {"op": "sketch", "path": path, "key": key, "base": base}, wanted
    for refusal in index["refusals"]:
        request = {
            "op": "apply",
            "path": str(VECTORS / refusal["path"]),
            "key": refusal["key"],
            "base": refusal["base"],
        }
        yield request, {"refused": [refusal["rule"]]}


def satisfied(implementation: Implementation, request: dict[str, Any], reply: dict[str, Any], wanted: Any) -> bool:
    """Whether a reply is the one that the vectors ask for."""
    match request["op"]:
        case "validate":
            broken, spelled_otherwise = wanted
            problems = [p for p in reply["problems"] if not (spelled_otherwise and p["rule"] == "LF-207")]
            said = {(p["rule"], p["severity"]) for p in problems}
            places = all(any(where in p["where"] for p in problems) for _, _, where in broken)
            return said == {(rule, severity) for rule, severity, _ in broken} and places
        case "roundtrip":
            out = Path(request["out"])
            written = out.read_bytes()
            same = written == (VECTORS / wanted["path"].replace("\\", "/")).read_bytes()
            digest = implementation.ask(op="digest", path=str(out))
            return same == wanted["canonical"] and digest in ({"digest": wanted["digest"]}, {"unsupported": True})
        case _:
            return close(reply, wanted) if isinstance(wanted, np.ndarray) else reply == wanted


def check(implementation: Implementation, folder: Path, operations: Sequence[str]) -> dict[str, Score]:
    """Ask everything about these operations."""
    scores = {operation: Score() for operation in operations}
    index = json.loads((VECTORS / "index.json").read_text(encoding="utf-8"))
    for request, wanted in questions(index, folder):
        if request["op"] not in scores:
            continue
        score, reply = scores[request["op"]], implementation.ask(**request)
        if reply.get("unsupported"):
            score.unknown += 1
        elif satisfied(implementation, request, reply, wanted):
            score.passed += 1
        else:
            said = json.dumps(reply, ensure_ascii=False)[:200]
            score.misses.append(f"{Path(request['path']).name} {request.get('key', '')}: {said}")
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="classes", action="append", choices=CLASSES, default=[], help="claimed")
    parser.add_argument("--only", action="append", choices=OPERATIONS, help="ask nothing else")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("which command is to be checked?")
    implementation = Implementation(options.command)
    try:
        with tempfile.TemporaryDirectory() as folder:
            scores = check(implementation, Path(folder), options.only or OPERATIONS)
        implementation.close()
    except (EOFError, BrokenPipeError) as error:
        print(f"missed: no reply: {error}")
        return 1
    claimed = {operation for name in options.classes for operation in CLASSES[name]}
    wrong = False
    print(f"{'operation':10} {'passed':>7} {'missed':>7} {'unknown':>8}")
    for operation, score in scores.items():
        print(f"{operation:10} {score.passed:7} {len(score.misses):7} {score.unknown:8}")
        wrong = wrong or bool(score.misses) or (operation in claimed and score.unknown > 0)
    for operation, score in scores.items():
        for miss in score.misses:
            print(f"missed: {operation} {miss}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
