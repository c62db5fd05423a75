"""``loraformat info FILE`` against ``python -c 'import numpy'``: a look at a file is no framework's start."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import loraformat as lf
from bench.measure import command, interleave, row
from loraformat.testing import random_adapter


def main(runs: int = 15) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.lora.safetensors"
        lf.save(random_adapter(kinds=("lora", "conv", "embedding")), file)
        python = sys.executable
        timings = interleave(
            {
                "import numpy": command(python, "-c", "import numpy"),
                "loraformat info": command(str(Path(python).with_name("loraformat")), "info", str(file)),
            },
            runs,
        )
    print(row("python -c 'import numpy'", timings["import numpy"], timings["import numpy"], "the limit"))
    print(row("loraformat info FILE", timings["loraformat info"], timings["import numpy"], "budget ≤ 2.5 ×"))


if __name__ == "__main__":
    main()
