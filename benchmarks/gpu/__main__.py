"""One command that says whether all of this works on a GPU, and how fast: `make gpu-check`.

Every part runs in a process of its own with a time limit, so that a crash of one leaves the others. No network; beside
the project only torch, triton, transformers and pytest.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.checks import FAIL, SKIP, Check, CheckLog, read_checks
from benchmarks.gpu.part import PARTS
from benchmarks.gpu.report import summarize, write_report

ROOT = Path(__file__).parents[2]
MINUTES = 9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m swim_fast.gpu_check", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to test the check")
    parser.add_argument("--quick", action="store_true", help="one case of each test, fewer sizes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all parts; default: 9")
    parser.add_argument("--ignore-values", action="store_true", help="judge no value: for a pretend GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu-check", help="folder of the results")
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    begin, checks = time.monotonic(), []
    for name in args.only:
        left = 60 * args.minutes - (time.monotonic() - begin)
        print(f"{name}: {PARTS[name].shows} …", flush=True)
        found = run_part(name, args, output, left)
        print(f"  {summarize(found)}", flush=True)
        checks += found
    return write_report(output, checks, args.device, time.monotonic() - begin)


def run_part(name: str, args: argparse.Namespace, output: Path, left: float) -> list[Check]:
    """Run a part within its time and the time that is left; return its checks, with one more if it did not end well."""
    path, noise = output / f"{name}.jsonl", output / f"{name}.log"
    path.unlink(missing_ok=True)
    log, seconds = CheckLog(name, path), min(PARTS[name].seconds * max(1, args.minutes / MINUTES), left)
    if seconds < 10:
        log.add(name, SKIP, f"no time left of {args.minutes:g} minutes; run it with --only {name}")
        return read_checks(path)
    words = [sys.executable, "-m", "benchmarks.gpu.part", name, "--device", args.device, "--output", str(output)]
    words += ["--seconds", f"{seconds:.0f}"]
    words += [flag for flag, given in (("--quick", args.quick), ("--ignore-values", args.ignore_values)) if given]
    begin = time.monotonic()
    with noise.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(name, args.device), stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds + 15)  # a part keeps its time itself; this is for one that hangs
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    elapsed = time.monotonic() - begin
    if code:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        log.add(f"{name} runs to its end", FAIL, f"{how}: {last_line(noise)} (see {noise.name})", elapsed)
    elif code is None:
        log.add(f"{name} runs to its end", FAIL, f"stopped after {elapsed:.0f} s: {last_line(noise)}", elapsed)
    elif not path.exists():
        log.add(f"{name} runs to its end", FAIL, f"it checked nothing (see {noise.name})", elapsed)
    return read_checks(path)


def environment(name: str, device: str) -> dict[str, str]:
    """Return the environment of a part: our packages, one GPU, and the interpreter on the CPU."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    env.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        if PARTS[name].interpreted:
            env["TRITON_INTERPRET"] = "1"
    elif name not in ("environment", "model"):  # training refuses a process that sees several GPUs
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return env


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
