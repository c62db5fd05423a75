"""Every benchmark, one after the other: ``make bench``. Ratios count, not seconds."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import algebra, attach, convert, extract, merge, startup, validate

print(f"{'what':28} {'median':>7}   {'(least–most)':16} {'processor':>9} {'peak':>7}       {'ratio':>5}")
for benchmark in (startup, validate, attach, merge, convert, algebra, extract):
    benchmark.main()
