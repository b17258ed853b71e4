"""Options and results of the benchmarks: `python -m pytest benchmarks`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.attention_loss import report

HERE = Path(__file__).parent / "attention_loss"
LENGTHS, ROWS = (4096, 8192, 16384, 32768), (8, 64)


def pytest_addoption(parser):
    group = parser.getgroup("attention loss benchmark")
    group.addoption("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the sequence")
    group.addoption("--rows", type=int, nargs="+", default=ROWS, help="noun tokens")
    group.addoption("--memory-gib", type=float, default=8, help="if a method keeps more, fewer layers are measured")
    group.addoption("--attention", type=Path, help="folder where the attention is kept for other processes")
    group.addoption("--output", type=Path, default=HERE, help="folder of the results")


def pytest_generate_tests(metafunc):
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", metafunc.config.getoption("lengths"), scope="module", ids="{} tokens".format)
    if "num_rows" in metafunc.fixturenames:
        metafunc.parametrize("num_rows", metafunc.config.getoption("rows"), ids="{} rows".format)


@pytest.fixture
def keep(request):
    """Puts a record into the CSV at once: a run that is killed loses nothing. Those measured before stay in it."""
    folder = request.config.getoption("output")

    def keep(record):
        report.write([record], folder)
        request.config.attention_loss_kept = folder

    return keep


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    folder = getattr(config, "attention_loss_kept", None)
    if folder is not None:
        report.draw(folder)
        terminalreporter.section("attention loss")
        terminalreporter.write_line((folder / f"{report.NAME}.md").read_text(encoding="utf-8"))
        terminalreporter.write_line(f"written to {folder}")
