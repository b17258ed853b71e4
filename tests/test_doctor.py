"""`swim-fast doctor`: versions without imports, checks that may crash, one screen, an exit code."""

import importlib
import importlib.metadata
import json
import subprocess
import sys
import threading

import pytest
import torch

from swim_fast import doctor
from swim_fast.cli import main
from swim_fast.doctor import Check, Finding, find_packages, list_checks, run_check
from tests.kernels.flash_noun_attention_cases import stand_ins  # noqa: F401


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name, source): a package that goes before the installed one."""

    def write(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    return write


def found(name: str) -> dict[str, Finding]:
    """What a check finds in this process, by name."""
    return {finding.name: finding for finding in list_checks()[name].run()}


def test_the_program_imports_no_library_of_its_own():
    code = "import sys, swim_fast.doctor as d; list(d.find_packages()); print(*{'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_packages_are_those_of_the_metadata(monkeypatch):
    installed = importlib.metadata.version
    changed = {"torch": "2.3.1", "flash-attn": None, "transformers": None}

    def version(name):
        if name in changed and changed[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    packages = {package.name: package for package in find_packages()}
    assert {"numpy", "liger-kernel", "deepspeed", "av", "torchcodec", "peft", "openai"} <= packages.keys()
    assert not {"pytest", "ruff"} & packages.keys()  # of those who work on the project
    numpy, torch, transformers = (packages[name] for name in ("numpy", "torch", "transformers"))
    assert (numpy.state, numpy.detail, numpy.group) == ("ok", installed("numpy"), "required")
    assert torch.state == "broken" and torch.required and torch.detail.startswith("2.3.1 (needs >=")
    assert transformers.state == "missing" and transformers.remedy.startswith("pip install 'transformers")
    flash = packages["flash-attn"]
    assert (flash.group, flash.required, flash.remedy) == ("cuda", False, doctor.INSTALL_GPU)


def test_a_project_that_is_not_installed_is_a_line(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", absent)
    (package,) = find_packages()
    assert package.remedy == "pip install -e ." and not package.required


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("import os; print('noise'); os.abort()", "crashes with exit status -6"),
        ("import os; os.write(2, b'out of luck'); os._exit(3)", "crashes with exit status 3: out of luck"),
        ("raise RuntimeError('no CUDA here\\nundefined symbol: _ZN')", "RuntimeError: undefined symbol: _ZN"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("import time; time.sleep(60)", "hangs: no end within 3 s"),
    ],
)
def test_a_package_that_breaks_is_a_line(fake, monkeypatch, source, detail):
    monkeypatch.setattr(doctor, "SECONDS", 3 if "sleep" in source else 100)
    fake("transformers", source)
    (finding,) = run_check("transformers")
    assert (finding.name, finding.state, finding.required) == ("transformers", "broken", True)
    assert finding.detail.startswith(detail)


def test_a_library_that_talks_does_not_drown_the_answer(fake):
    fake("bitsandbytes", "print('hello')")
    assert run_check("bitsandbytes") == [Finding("bitsandbytes", "ok", "can be imported")]


def test_readers(fake):
    usable = Finding("reader decord", "ok", "decodes a small clip (32 × 32)", required=True)
    assert run_check("reader decord") == [usable]
    fake("av", "raise ModuleNotFoundError(\"No module named 'av'\")")
    (finding,) = run_check("reader pyav")
    assert (finding.state, finding.remedy, finding.required) == ("missing", "pip install av", False)
    assert "swim-fast doctor" not in finding.detail


def test_triton_needs_a_compiler_and_headers(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    assert found("Triton")["Triton"].state == "ok"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "cannot build its launchers" in found("Triton")["Triton"].detail
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert found("Triton")["Triton"].remedy == "install gcc, or set CC"


def test_gpu(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA H100", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides" in found("GPU")["GPU"].detail
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("shutil.which", lambda name: "/bin/nvidia-smi")
    gpu = found("GPU")["GPU"]
    assert gpu.state == "broken" and "driver" in gpu.remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert found("GPU")["GPU"].detail.startswith("2 × NVIDIA H100 (compute capability 9.0, 80 GiB); torch is built")


def test_flash_attention_on_a_gpu(monkeypatch, stand_ins):  # noqa: F811
    """Libraries that can be used, are absent, are damaged, or have no kernels for this GPU."""
    package = importlib.import_module("swim_kernels.flash_noun_attention")  # the op has its name
    reasons = package.check_providers("cpu")[1]
    assert set(reasons.values()) == {None}
    monkeypatch.setattr(doctor, "_get_device", lambda: "cuda")
    check = package.check_providers
    monkeypatch.setattr(package, "check_providers", lambda device: ("torch_cuda", check("cpu")[1]))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", object())
    findings = found("flash attention")
    assert findings["flash attention"].detail == "auto (sdpa) takes torch_cuda on cuda"
    assert findings["flash_attn_2"].remedy == doctor.INSTALL_GPU
    assert findings["flash_attn_3"].state == "broken" and findings["flash_attn_4"].state == "ok"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert found("flash attention")["flash_attn_4"].state == "missing"


def test_kernels_run():
    assert found("kernels")["kernels"].detail == "auto takes torch on cpu; a small call ran"


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("broken", 1), ("missing", 1)])
def test_exit_code_is_that_of_what_is_required(monkeypatch, capsys, state, code):
    checks = {
        "kernels": Finding("kernels", state, "detail", "a remedy", required=True),
        "peft": Finding("peft", "broken", "x", "a remedy"),
    }
    monkeypatch.setattr(doctor, "find_packages", lambda: [Finding("numpy", "ok", "2.0", group="required")])
    monkeypatch.setattr(doctor, "list_checks", lambda: {name: Check(None) for name in checks})
    monkeypatch.setattr(doctor, "run_check", lambda name: [checks[name]])
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert "  required    numpy 2.0" in lines and "  kernels, peft: a remedy" in lines
    assert main(["doctor", "--format", "json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] == (code == 0) and told["checks"][1]["state"] == "broken"


def test_a_report_is_one_screen(monkeypatch):
    monkeypatch.setattr(doctor, "list_checks", lambda: {"peft": Check(None, "peft"), "x": Check(None, "flash-attn")})
    monkeypatch.setattr(doctor, "run_check", lambda name: [Finding(name, "ok", "word " * 12)] * 16)
    packages = [*find_packages(), Finding("flash-attn", "missing", "(not installed)", doctor.INSTALL_GPU)]
    monkeypatch.setattr(doctor, "find_packages", lambda: packages)
    lines = []
    report = doctor.examine(lines.append)
    assert {check.name for check in report.checks} == {"peft", "FFmpeg"}  # no use in trying what is not there
    assert len(lines) <= 50 and max(map(len, lines)) <= 120


def test_lines_are_shown_as_they_are_known(monkeypatch):
    lines, shown = [], threading.Event()

    def show(line):
        lines.append(line)
        if "quick" in line:
            shown.set()

    def check(name):
        assert name == "quick" or shown.wait(20)
        return [Finding(name, "ok", "works")]

    monkeypatch.setattr(doctor, "list_checks", lambda: {"quick": Check(None), "slow": Check(None)})
    monkeypatch.setattr(doctor, "run_check", check)
    assert [finding.name for finding in doctor.examine(show).checks] == ["quick", "slow", "FFmpeg"]
    assert lines[2] == "installed" and lines[-1].endswith(" works.")
