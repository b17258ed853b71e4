"""Records in a CSV file, tables and targets of every benchmark."""

from dataclasses import dataclass, replace

import pytest

from benchmarks.core import (
    RecordFile,
    Target,
    describe_machine,
    format_ratio,
    markdown_table,
    read_cpu_model,
    targets_table,
)


@dataclass(frozen=True)
class Row:
    name: str
    size: int
    seconds: float
    peak: int | None = None


def test_records_are_written_at_once_each_in_its_place(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    file = RecordFile(path, Row, "name", "size")
    first, second = Row("a, b", 1, 0.1), Row("é", 2, 1e-9, 7)
    file.put(first)
    assert path.read_text() == 'name,size,seconds,peak\n"a, b",1,0.1,\n'
    file.put(second, replace(first, seconds=3.0))
    again = RecordFile(path, Row, "name", "size")
    assert list(again.records.items()) == [(("a, b", 1), replace(first, seconds=3.0)), (("é", 2), second)]
    assert [found.name for found in path.parent.iterdir()] == ["rows.csv"]


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("name,size\na,1\n")
    with pytest.raises(KeyError, match="seconds"):
        RecordFile(tmp_path / "rows.csv", Row, "name")


def test_table():
    assert markdown_table(("a", "b"), "lr", [(1, None), ("x", 2.5)]) == [
        "| a | b |",
        "|---|---:|",
        "| 1 |  |",
        "| x | 2.5 |",
    ]


def test_targets():
    targets = [
        Target("time", 0.5, 1 / 3),
        Target("peak", 0.5, 0.5),
        Target("speed", 0.7, 0.8, "{:.0%}".format, at_least=True),
    ]
    assert targets_table(targets, ("copies", "none", "none", "met"))[2:] == [
        "| time | at most 0.33 | 0.50 | **not met** |",
        "| peak | at most 0.50 | 0.50 | met |",
        "| speed | at least 80% | 70% | **not met** |",
        "| copies | none | none | met |",
    ]
    assert [format_ratio(value) for value in (2.6, 0.1, 1 / 500)] == ["2.60", "0.10", "1/500"]


def test_figures_of_a_gpu_are_not_recorded_as_those_of_the_cpu(monkeypatch):
    assert describe_machine()["cpu"] == read_cpu_model()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="has used a GPU"):
        describe_machine()


def test_cpu_model(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU 9\n\nmodel name\t: Some CPU 9\n")
    assert read_cpu_model(tmp_path / "cpuinfo") == "Some CPU 9"
    assert read_cpu_model(tmp_path / "missing")
