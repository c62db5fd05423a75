"""Write the test vectors: ``python make.py`` writes them and ``index.json``, ``--check`` compares instead.

``valid`` files conform; ``warned`` ones conform and call for a warning; ``invalid`` ones break one rule each. Beside
a valid or warned file stands ``NAME.expected.safetensors`` with what it must mean.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import additive  # noqa: F401  (each registers its cases)
import factored  # noqa: F401
import fields
import headers
import placement
import shapes
import special  # noqa: F401
import targets
import values
import whole  # noqa: F401
from broken import BROKEN, Broken
from refused import REFUSALS
from vector import VALID, Vector

HERE = Path(__file__).resolve().parent
FOLDERS = ("valid", "warned", "invalid")


def vectors() -> dict[str, bytes]:
    """Every file by its path."""
    made: list[Vector | Broken] = []
    for case, rules in VALID:
        vector = Vector(case.__name__, str(case.__doc__), rules)
        case(vector)
        made.append(vector)
    for module in (headers, fields, targets, shapes, values, placement):
        for section in module.SECTIONS:
            section()
    made += BROKEN
    files = {name: data for item in made for name, data in item.files().items()}
    index: dict[str, Any] = {
        "$schema": "index.schema.json",
        "version": "1.0",
        "vectors": [item.as_json() for item in made],
        "refusals": [refusal.as_json() for refusal in REFUSALS],
    }
    return files | {"index.json": _text(index)}


def _text(index: dict[str, Any]) -> bytes:
    """The index as JSON, an entry a line."""
    members = []
    for name, value in index.items():
        lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value) if name[-1] == "s" else ""
        members.append(f'"{name}": [\n  {lines}\n ]' if lines else f'"{name}": {json.dumps(value)}')
    return ("{\n " + ",\n ".join(members) + "\n}\n").encode()


def main(arguments: list[str]) -> int:
    """Write or compare; the exit code."""
    wanted = vectors()
    found = {f"{folder}/{p.name}": p for folder in FOLDERS for p in (HERE / folder).glob("*")}
    found["index.json"] = HERE / "index.json"
    if arguments == ["--check"]:
        wrong = [name for name in wanted.keys() | found.keys() if not _same(found.get(name), wanted.get(name))]
        for name in sorted(wrong):
            print(f"differs: {name}", file=sys.stderr)
        return 1 if wrong else 0
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for name in found.keys() - wanted.keys():
        found[name].unlink()
    for name, data in wanted.items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_bytes(data)
    print(f"{len(wanted)} files, {sum(map(len, wanted.values())):,} bytes")
    return 0


def _same(path: Path | None, data: bytes | None) -> bool:
    return path is not None and data is not None and path.exists() and path.read_bytes() == data


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
