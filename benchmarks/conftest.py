"""Options and results of the benchmarks: `python -m pytest benchmarks`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import attention_loss_report as report

HERE = Path(__file__).parent
OTHER = Path("runs/attention_loss")
LENGTHS, ROWS = (4096, 8192, 16384, 32768), (8, 64)


def pytest_addoption(parser):
    group = parser.getgroup("attention loss benchmark")
    group.addoption("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the sequence")
    group.addoption("--rows", type=int, nargs="+", default=ROWS, help="noun tokens")
    group.addoption("--memory-gib", type=float, default=14, help="if a method keeps more, fewer layers are measured")
    group.addoption("--output", type=Path, help=f"folder of the results; else {HERE.name}, of a part {OTHER}")


def pytest_generate_tests(metafunc):
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", metafunc.config.getoption("lengths"), scope="module", ids="{} tokens".format)
    if "num_rows" in metafunc.fixturenames:
        metafunc.parametrize("num_rows", metafunc.config.getoption("rows"), ids="{} rows".format)


@pytest.fixture(scope="session")
def records(request):
    """The rows of the CSV, written at the end."""
    rows = request.config.attention_loss_records = []
    return rows


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows = getattr(config, "attention_loss_records", [])
    if not rows:
        return
    folder = _folder(config, exitstatus)
    report.write(rows, folder)
    terminalreporter.section("attention loss")
    terminalreporter.write_line(report.draw_text(rows))
    terminalreporter.write_line(f"written to {folder}")


def _folder(config, exitstatus: int) -> Path:
    """What is kept beside this file is one whole run in which nothing failed."""
    whole = tuple(config.getoption("lengths")) == LENGTHS and tuple(config.getoption("rows")) == ROWS
    whole = whole and not config.getoption("keyword") and exitstatus == 0
    return config.getoption("output") or (HERE if whole else OTHER)
