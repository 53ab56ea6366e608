"""Converting holds a tensor at a time, not the model."""

import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytestmark = pytest.mark.subprocess


def test_converting_holds_a_tensor_at_a_time():
    argv = [sys.executable, ROOT / "benchmarks" / "convert_memory.py", "--gigabytes", "0.3"]
    process = subprocess.run(argv, capture_output=True, text=True, check=True)
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["checkpoint_bytes"] > 280e6
    assert result["peak_anonymous_bytes"] < 150e6  # of which imports take some 60 MB
