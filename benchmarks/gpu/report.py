"""Report of the GPU check: a table on the screen and in `gpu_check.md`, every check in `gpu_check.json`."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.core import markdown_table
from benchmarks.gpu.checks import FAIL, MISS, PASS, SKIP, Check
from swim_fast.files import atomic_write

MACHINE, REPORT, CHECKS = "machine.json", "gpu_check.md", "gpu_check.json"


def summarize(checks: Sequence[Check]) -> str:
    """Return `12 PASS, 1 SKIP` of some checks."""
    counts = Counter(check.status for check in checks)
    return ", ".join(f"{counts[status]} {status}" for status in (PASS, FAIL, MISS, SKIP) if counts[status])


def write_report(folder: Path, checks: Sequence[Check], device: str, seconds: float) -> int:
    """Write and print the report; return the exit code: 1 if a check failed or none passed."""
    machine = json.loads((folder / MACHINE).read_text(encoding="utf-8")) if (folder / MACHINE).exists() else {}
    machine |= {"device": device, "commit": read_commit(), "seconds": round(seconds)}
    counts = Counter(check.status for check in checks)
    verdict = FAIL if counts[FAIL] or not counts[PASS] else PASS
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    rows = []
    for part in dict.fromkeys(check.part for check in checks):
        own = [check for check in checks if check.part == part]
        states = {check.status for check in own}
        state = next(status for status in (FAIL, MISS, PASS, SKIP) if status in states)
        rows.append((part, state, summarize(own), f"{sum(check.seconds for check in own):.0f} s"))
    lines += markdown_table(("part", "", "checks", "time of all checks"), "lllr", rows)
    for status, title in ((FAIL, "Failures"), (MISS, "Targets that are not met"), (SKIP, "Skipped")):
        found = [check for check in checks if check.status == status]
        if found:
            lines += ["", f"## {title}", "", *list_checks(found, by_reason=status == SKIP)]
    known = [check for check in checks if check.status == PASS and check.detail]
    if known:
        lines += ["", "## Found", "", *list_checks(known)]
    lines += ["", f"**{verdict}**: {summarize(checks)} in {seconds:.0f} s"]
    text = "\n".join(lines) + "\n"
    with atomic_write(folder / REPORT) as file:
        file.write(text)
    with atomic_write(folder / CHECKS) as file:
        file.write(json.dumps({"machine": machine, "verdict": verdict, "checks": list(map(asdict, checks))}, indent=1))
    print(f"\n{text}\n{folder / REPORT}  {folder / CHECKS}")
    return 0 if verdict == PASS else 1


def list_checks(checks: Sequence[Check], by_reason: bool = False) -> list[str]:
    """Return a line for each check, or for each reason with the number of checks that it stands for."""
    if not by_reason:
        return [f"- {check.part}: {check.name}" + f" — {check.detail}" * bool(check.detail) for check in checks]
    reasons = Counter((check.part, check.detail) for check in checks)
    first = {(check.part, check.detail): check.name for check in reversed(checks)}
    return [
        f"- {part}: {first[part, reason]}" + f" and {count - 1} more" * (count > 1) + f" — {reason}"
        for (part, reason), count in reasons.items()
    ]


def read_commit() -> str:
    """Return the commit of the checkout, with a + if files are changed; "" without git."""
    root = Path(__file__).parents[2]
    try:
        read = {"cwd": root, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **read).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **read).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + "+" * bool(changed)
