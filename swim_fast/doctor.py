"""`swim-fast doctor`: what is installed, what works here, and the commands that install the rest.

Versions come from the metadata of the distributions, without an import. What works is tried in processes of their own:
a library that crashes or hangs costs its own line alone. Nothing heavy is imported here.
"""

import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

SECONDS = 180  # of one check: importing torch from a cold network disk takes its time
MARKS = {"ok": "ok", "missing": "--", "broken": "!!"}
REQUIRED = "required"
OTHER_EXTRAS = ("test", "dev", "demo")  # of those who work on the project
INSTALL_GPU = "make install-gpu, in a checkout"  # flash-attn's build fails under plain pip
ANSWER = "\n--- answer ---\n"  # of a check, behind whatever libraries print
CLIP = b"YUV4MPEG2 W32 H32 F2:1 C420jpeg\n" + b"".join(b"FRAME\n" + bytes([grey] * 1536) for grey in (60, 120))


@dataclass(frozen=True)
class Finding:
    """A package, or something that was tried.

    Attributes:
        state: "ok", "missing" for what is not there, "broken" for what is there and cannot be used.
        remedy: command or advice, if something is to be done.
        group: extra that a package belongs to, or `REQUIRED`.
    """

    name: str
    state: str
    detail: str
    remedy: str = ""
    required: bool = False
    group: str = ""


@dataclass(frozen=True)
class Check:
    """Something to try.

    Attributes:
        run: yields findings; an exception becomes one.
        package: distribution without which there is nothing to try.
    """

    run: Callable[[], Iterator[Finding]]
    package: str = ""
    required: bool = False


@dataclass(frozen=True)
class Report:
    """All findings."""

    packages: list[Finding]
    checks: list[Finding]

    @property
    def usable(self) -> bool:
        """True unless something that every run needs is missing or broken."""
        return all(finding.state == "ok" for finding in (*self.packages, *self.checks) if finding.required)

    def as_json(self) -> str:
        return json.dumps({"usable": self.usable} | asdict(self), indent=2)


def format_packages(packages: Sequence[Finding]) -> Iterator[str]:
    """Yield the lines about this machine and what is installed, the first of the screen."""
    from swim_fast import __version__

    yield from (f"swim-fast {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "installed")
    for group in dict.fromkeys(package.group for package in packages):
        found = ", ".join(f"{p.name} {p.detail}" for p in packages if p.group == group)
        yield from _wrap(f"  {group:<12}", found)
    yield from ("", "works here")


def format_check(check: Finding) -> Iterator[str]:
    """Yield the lines about something that was tried."""
    yield from _wrap(f"  {MARKS[check.state]} {check.name:<18}", check.detail)


def format_end(report: Report) -> Iterator[str]:
    """Yield the remedies and the verdict, the last lines of the screen."""
    remedies: dict[str, dict[str, None]] = {}
    for finding in (*report.packages, *report.checks):
        if finding.remedy:
            remedies.setdefault(finding.remedy, {})[finding.name] = None
    if remedies:
        yield from ("", "for the rest")
    for remedy, names in remedies.items():
        yield from _wrap(f"  {', '.join(names)}: ", remedy)
    yield from ("", "All that is required works." if report.usable else "Something that is required does not work.")


def _wrap(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def examine(show: Callable[[str], None] = lambda line: None) -> Report:
    """Return what is found here; takes seconds, for every check imports its libraries anew.

    Args:
        show: called with each line of the screen as soon as it is known.
    """
    report = Report(list(find_packages()), [])

    def tell(lines: Iterable[str]) -> None:
        for line in lines:
            show(line)

    tell(format_packages(report.packages))
    absent = {package.name for package in report.packages if package.state == "missing"}
    names = [name for name, check in list_checks().items() if check.package not in absent]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for findings in itertools.chain(pool.map(run_check, names), [[_find_ffmpeg()]]):
            for finding in findings:
                report.checks.append(finding)
                tell(format_check(finding))
    tell(format_end(report))
    return report


def find_packages() -> Iterator[Finding]:
    """Yield the packages that the metadata of swim-fast names, the required ones first."""
    try:
        from packaging.requirements import Requirement

        own = importlib.metadata.metadata("swim-fast")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        yield Finding("swim-fast", "missing", f"not installed ({error})", "pip install -e .", group=REQUIRED)
        return
    requirements = [Requirement(text) for text in own.get_all("Requires-Dist", [])]

    def belongs(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    for requirement in requirements:
        if belongs(requirement, ""):
            yield _find_package(requirement, REQUIRED)
    for extra in own.get_all("Provides-Extra", []):
        for requirement in requirements:
            if extra not in OTHER_EXTRAS and belongs(requirement, extra) and not belongs(requirement, ""):
                yield _find_package(requirement, extra)


def _find_package(requirement, group: str) -> Finding:
    name, versions = requirement.name, requirement.specifier
    remedy = INSTALL_GPU if name == "flash-attn" else f"pip install '{name}{versions}'"
    found = partial(Finding, name, required=group == REQUIRED, group=group)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return found("missing", "(not installed)", remedy)
    if not versions.contains(version, prereleases=True):
        return found("broken", f"{version} (needs {versions})", remedy)
    return found("ok", version)


def list_checks() -> dict[str, Check]:
    """Return the checks by name, in the order of the screen."""
    from swim_fast.options import Decoding

    return {
        "GPU": Check(_check_gpu, "torch", required=True),
        "transformers": Check(partial(_import, "transformers", "AutoModelForImageTextToText"), required=True),
        "Triton": Check(_check_triton, "triton"),
        "kernels": Check(_check_kernels, "torch", required=True),
        "flash attention": Check(_check_flash_attention, "torch", required=True),
        "Liger": Check(_check_liger, "liger-kernel"),
        **{name: Check(partial(_import, name), name) for name in ("deepspeed", "bitsandbytes")},
        "peft": Check(_check_peft, "peft"),
        **{
            f"reader {reader}": Check(partial(_check_reader, reader), required=reader == Decoding().reader)
            for reader in get_args(Decoding.model_fields["reader"].annotation)
        },
    }


def run_check(name: str) -> list[Finding]:
    """Return what a check finds, in a process of its own."""
    check = list_checks()[name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    broken = partial(Finding, name, "broken", required=check.required)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "swim_fast.doctor", name],
            capture_output=True, text=True, errors="replace", env=environment, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [broken(f"hangs: no end within {SECONDS} s")]
    _, answered, answer = done.stdout.rpartition(ANSWER)
    if not answered:
        return [broken(f"crashes with exit status {done.returncode}: {_last_line(done.stderr)}")]
    answer = json.loads(answer)
    if isinstance(answer, str):
        return [broken(answer)]
    return [replace(Finding(**finding), required=check.required and finding["name"] == name) for finding in answer]


def _answer(name: str) -> None:
    """Print what a check finds; the process that `run_check` starts."""
    try:
        answer = [asdict(finding) for finding in list_checks()[name].run()]
    except Exception as error:
        answer = f"{type(error).__name__}: {_last_line(str(error))}"
    print(ANSWER + json.dumps(answer), flush=True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 300) if lines else "no word"


def _import(module: str, attribute: str = "__name__") -> Iterator[Finding]:
    if _get_device() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for one, and may take it amiss
    getattr(importlib.import_module(module), attribute)
    yield Finding(module, "ok", "can be imported")


def _get_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_gpu() -> Iterator[Finding]:
    import torch

    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = Counter((p.name, f"{p.major}.{p.minor}", f"{p.total_memory / 2**30:.0f} GiB") for p in found)
        texts = [f"{n} × {name} (compute capability {cap}, {memory})" for (name, cap, memory), n in kinds.items()]
        yield Finding("GPU", "ok", f"{', '.join(texts)}; {built}")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("GPU", "ok", "none: CUDA_VISIBLE_DEVICES hides them all; everything runs on the CPU")
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        remedy = "install a torch that is built for the CUDA of the driver (nvidia-smi shows its version)"
        yield Finding("GPU", "broken", f"there is a driver, but torch sees no GPU; {built}", remedy)
    else:
        yield Finding("GPU", "ok", "none: everything runs on the CPU")


def _check_triton() -> Iterator[Finding]:
    import triton

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as triton.runtime.build
    if compiler is None:
        yield Finding("Triton", "broken", "finds no C compiler to build launchers with", "install gcc, or set CC")
        return
    command = [*shlex.split(compiler), "-fsyntax-only", "-x", "c", "-I", sysconfig.get_path("include"), "-"]
    done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
    if done.returncode:
        remedy = "install the headers of this Python (python3-dev), and a C compiler that works"
        yield Finding("Triton", "broken", f"{compiler} cannot build its launchers: {_last_line(done.stderr)}", remedy)
        return
    yield Finding("Triton", "ok", f"{triton.__version__}, builds launchers with {compiler}")


def _check_kernels() -> Iterator[Finding]:
    import torch

    from swim_kernels import NounQueries, noun_attention
    from swim_kernels.runtime import find_triton_obstacle

    device = _get_device()
    obstacle = find_triton_obstacle(device)
    zero, one = (torch.tensor([value], device=device) for value in (0, 15))
    queries = NounQueries(zero, one, zero, one + 1, zero, key_sets=torch.arange(1, 9, device=device)[None])
    query = torch.randn(1, 2, 16, 64, device=device, dtype=torch.bfloat16)
    noun_attention(query, query, queries).sum().item()
    yield Finding("kernels", "ok", f"auto takes {'torch' if obstacle else 'triton'} on {device}; a small call ran")
    if obstacle and device == "cuda":
        yield Finding("Triton kernels", "broken", f"{obstacle}; torch's are slower")


def _check_flash_attention() -> Iterator[Finding]:
    from swim_kernels.flash_noun_attention import check_providers

    device = _get_device()
    auto, reasons = check_providers(device)
    state = "broken" if reasons[auto] else "ok"
    yield Finding("flash attention", state, reasons[auto] or f"auto (sdpa) takes {auto} on {device}")
    for name, reason in reasons.items():
        if device == "cuda" and name.startswith("flash_attn"):
            damaged = reason and "cannot be used" in reason and "No module named" not in reason
            state = "broken" if damaged else "missing" if reason else "ok"
            yield Finding(
                name, state, reason or "can be used", INSTALL_GPU if name == "flash_attn_2" and reason else ""
            )


def _check_liger() -> Iterator[Finding]:
    from swim_fast.modeling.liger import get_refusal

    refusal = get_refusal("cuda")
    if refusal is None:
        importlib.import_module("liger_kernel.ops")
    yield Finding("Liger", "broken" if refusal else "ok", refusal or "this version is accepted; it is used on CUDA")


def _check_peft() -> Iterator[Finding]:
    from swim_fast.modeling.adapters import get_peft_refusal

    refusal = get_peft_refusal()
    if refusal is None:
        importlib.import_module("peft")
    yield Finding("peft", "broken" if refusal else "ok", refusal or "this version is accepted")


def _check_reader(reader: str) -> Iterator[Finding]:
    from swim_fast.data.video.reader import FrameReader
    from swim_fast.errors import MissingLibraryError
    from swim_fast.options import Decoding

    name = f"reader {reader}"
    with tempfile.TemporaryDirectory() as folder, FrameReader(Decoding(reader=reader)) as frames:
        clip = Path(folder) / "clip.y4m"
        clip.write_bytes(CLIP)
        try:
            shape = frames.frames(clip, [1]).shape
        except MissingLibraryError as error:
            text = error.args[0]
            remedy = re.search(r"pip install \S+", text)
            state = "missing" if "No module named" in text else "broken"
            yield Finding(name, state, text, remedy[0] if remedy else "install FFmpeg with its shared libraries")
            return
    yield Finding(name, "ok", f"decodes a small clip ({shape[1]} × {shape[2]})")


def _find_ffmpeg() -> Finding:
    program = shutil.which("ffmpeg")
    if program is None:
        return Finding("FFmpeg", "missing", "no program ffmpeg; only the reader torchcodec needs one installed")
    shown = subprocess.run([program, "-version"], capture_output=True, text=True).stdout
    return Finding("FFmpeg", "ok", " ".join(shown.split()[:3]))


if __name__ == "__main__":
    _answer(sys.argv[1])
