"""The check for GPUs from end to end, values aside: what its first run on a real one must not stumble over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.checks import FAIL
from benchmarks.gpu.report import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    words = [sys.executable, "-m", "swim_fast.gpu_check", "--quick", "--ignore-values", "--minutes", "60"]
    done = subprocess.run([*words, "--output", str(tmp_path)], env=env, capture_output=True, text=True)
    checks = json.loads((tmp_path / CHECKS).read_text())["checks"]
    assert [check for check in checks if check["status"] == FAIL] == []
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
