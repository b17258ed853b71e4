"""Progress of long jobs in a file: few lines, at whole tenths; on a terminal tqdm's bar."""

import io

import pytest

from swim_fast import progress_bar
from swim_fast.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by hand, for the bar and for tqdm."""
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


def work(clock, total, seconds, **how) -> str:
    file = io.StringIO()
    with ProgressBar(total=total, file=file, mininterval=0, **how) as bar:
        bar._time = lambda: clock[0]
        bar.start_t = bar.last_print_t = clock[0]
        for _ in range(1000):
            clock[0] += seconds / 1000
            bar.update()
    return file.getvalue()


def test_a_file_gets_a_line_for_each_tenth(clock):
    lines = work(clock, 1000, 1000.0, desc="check", unit="record").splitlines()
    assert lines[0] == "check:  10 %  100 of 1,000 records  15:00 left" and lines[-1].startswith("check: 100 %")
    assert len(lines) == 10


def test_a_short_job_says_nothing(clock):
    assert work(clock, 1000, 0.9, desc="check", unit="record") == ""


def test_lines_are_a_second_apart(clock):
    assert len(work(clock, 1000, 3.0, unit="record").splitlines()) == 2


def test_without_a_total_there_is_a_line_a_minute(clock):
    lines = work(clock, None, 200.0, desc="reading", unit="unit").splitlines()
    assert len(lines) == 3 and lines[0].startswith("reading: 3") and "%" not in lines[0]


def test_bytes_are_shortened(clock):
    file = io.StringIO()
    with ProgressBar(total=4_000_000, file=file, desc="indexing", unit="B", unit_scale=True, mininterval=0) as bar:
        clock[0] += 2
        bar.update(2_000_000)
    assert file.getvalue().startswith("indexing:  50 %  2.00M of 4.00M B")


def test_a_terminal_gets_the_bar():
    file = Terminal()
    for _ in ProgressBar(range(3), file=file, desc="check"):
        pass
    assert "check: 100%|" in file.getvalue()


def test_nothing_is_written_where_it_is_off(clock):
    file = io.StringIO()
    for _ in ProgressBar(range(3), file=file, disable=True):
        clock[0] += 5
    assert file.getvalue() == ""
