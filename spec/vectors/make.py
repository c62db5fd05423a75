"""Write the test vectors: ``python make.py`` writes ``valid/`` and ``invalid/``, ``--check`` compares instead.

``valid/NAME.safetensors`` is a file, ``NAME.json`` says what it is, ``NAME.expected.safetensors`` holds what it
must mean (float32 ``matrix.KEY``, ``base.KEY``, ``delta.KEY``, ``result.KEY``). ``invalid/RULE-name.safetensors``
breaks one rule; ``invalid/index.json`` lists them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import additive  # noqa: F401  (each registers its cases)
import special  # noqa: F401
from broken import BROKEN
from vector import VALID, Vector

HERE = Path(__file__).resolve().parent


def vectors() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for case in VALID:
        vector = Vector(case.__name__, str(case.__doc__))
        case(vector)
        files |= {f"valid/{name}": data for name, data in vector.files().items()}
    for broken in BROKEN:
        files[f"invalid/{broken.file}"] = broken.data
    index = [broken.as_json() for broken in BROKEN]
    files["invalid/index.json"] = (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def main(arguments: list[str]) -> int:
    wanted = vectors()
    found = {f"{p.parent.name}/{p.name}": p for folder in ("valid", "invalid") for p in (HERE / folder).glob("*")}
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
    return path is not None and data is not None and path.read_bytes() == data


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
