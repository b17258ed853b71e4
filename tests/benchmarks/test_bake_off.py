"""The bake-off: its choices, its table, and one short run."""

from dataclasses import replace

import pytest

from benchmarks.bake_off import __main__ as driver
from benchmarks.bake_off import report
from benchmarks.bake_off.measure import TASK, Choice, Record, open_records, sensible_choices
from swim_fast.options import AttentionLoss


def some_record(choice, seed=0, reached=50):
    return Record(
        *choice, TASK, seed, 200, reached, 0.96 + seed / 100, 0.7, 0.4, 0.9, 0.5, 0.6, 0.2, "a CPU", 1, "2", "3"
    )


def test_choices_are_allowed_and_the_first_is_the_default():
    choices = sensible_choices()
    assert len(set(choices)) == len(choices) > 10
    for choice in choices:
        AttentionLoss(**choice._asdict())
    assert choices[0] == Choice(**{name: getattr(AttentionLoss(), name) for name in Choice._fields})


def test_table(tmp_path):
    paper, *_, released = sensible_choices()
    records = [some_record(paper), some_record(paper, 1, 75), some_record(released, 0), some_record(released, 1, None)]
    open_records(tmp_path / report.CSV).put(*records)
    text = report.draw(tmp_path)
    assert "| 2 | frame | mean | probability | bce | 62 | 0.965 ± 0.005 |" in text
    assert "| 2 | full | product | released, predictor | bce | > 200 |" in text
    kl = replace(records[0], criterion="kl")
    assert "| frame | mean | (any) | kl |" in report.draw_text([*records, kl])
    earlier = report.draw_text([replace(records[0], task="shade"), *records])
    assert "| 1 | frame" in earlier.partition("## Asked for what")[0], "questions are not averaged"


def test_committed_table_is_drawn_from_the_committed_records():
    records = list(open_records(report.HERE / report.CSV).records.values())
    assert report.draw_text(records) == (report.HERE / report.REPORT).read_text(encoding="utf-8")
    assert {record.choice for record in records} <= set(sensible_choices())
    assert records[0].choice == sensible_choices()[0]


@pytest.mark.slow
def test_a_short_run_writes_its_record_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    words = "bake_off --steps 2 --seeds 1 --clips 16 --workers 1 --output".split()
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path), "--only", "frame · mean · probability · bce"])
    driver.main()
    (record,) = open_records(tmp_path / report.CSV).records.values()
    assert record.choice == sensible_choices()[0] and record.steps == 2 and 0 <= record.mass_in_mask <= 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == [report.CSV, report.REPORT]
    capsys.readouterr()
    driver.main()  # at once
    assert "1 of 1" not in capsys.readouterr().out
