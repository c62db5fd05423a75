"""Whatever happens to a run that writes ONNX models, what stood there is whole until the new is, and nothing else is left."""

import subprocess
import sys
from pathlib import Path

import pytest
from faults import CASES

FEW = ("swap", "stack elsewhere", "merge codes", "detach folder", "combine")


@pytest.mark.skipif(sys.platform == "win32", reason="a fork is what is killed")
@pytest.mark.parametrize(
    ("case", "step"),
    [*((case, 23) for case in FEW), *(pytest.param(case, 3, marks=pytest.mark.slow) for case in CASES)],
)
def test_a_fault_at_a_file_event_leaves_the_old_output_or_the_new_one(case, step, tmp_path):
    """At each ``step``-th event: killed, told to end, failed, and on a disk that is full from there on."""
    words = [sys.executable, str(Path(__file__).with_name("faults.py")), case, str(tmp_path), str(step)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 10
