"""What must be importable where: fast, without a GPU, and with the folder `kernels/` in the way."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("deepspeed", "flash_attn", "liger_kernel", "transformers", "decord", "av", "triton")


def python(code: str, cwd: Path, path: str = "") -> str:
    import os

    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["swim_fast", "swim_kernels"])
def test_import_loads_nothing_heavy_of_its_own(package):
    # torch itself may load triton: compare with what it brings
    code = f"import sys, torch; before = set(sys.modules); import {package}; print(*(set(sys.modules) - before))"
    loaded = python(code, ROOT, f"{ROOT}:{ROOT / 'kernels'}").split()
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]


def test_kernels_folder_does_not_shadow_the_package_kernels(tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import Qwen2_5_VLForConditionalGeneration as M; import swim_kernels; print(M.__name__)"
    here = f"{ROOT}:{ROOT / 'kernels'}"
    assert "Qwen2_5" in python(code, ROOT, here)  # the folder `kernels/` alone
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    found = python(code + "; import kernels; print(kernels.__file__)", ROOT, f"{here}:{tmp_path}")  # a package as well
    assert str(tmp_path) in found
