import itertools

from benchmarks import demo_answers
from benchmarks.demo_answers import Record, draw_text, measure, open_records
from swim_fast.demo.run import RUNS, WITH, WITHOUT, WRONG


def records(seeds, **changes):
    answers = {WITH: 0.95, WITHOUT: 0.5, WRONG: 0.4} | changes
    found = [
        Record(name, seed, 300, answers[name], 150 if name == WITH else None, 0.9, 0.6, 0.4)
        for seed, name in itertools.product(seeds, RUNS)
    ]
    return found + [Record(WITHOUT, seed, 900, 0.9, 600, 0.3, 0.1, 0.1) for seed in seeds]


def test_table_has_a_row_per_seed_and_names_what_is_missing():
    text = draw_text(records([1, 2]))
    assert "2 of 8 seeds" in text
    assert "| 1 | 0.950 | 0.500 | 0.400 | 0.900 | 150 | 600 |" in text
    assert text.count("| met |") == 5
    part = draw_text([record for record in records([1, 2]) if (record.seed, record.run) != (2, WRONG)])
    assert "1 of 8 seeds" in part and "| 2 |" not in part


def test_targets_that_are_missed_are_said():
    assert "| **not met** |" in draw_text(records([1], **{WITHOUT: 0.7}))
    without_longer = draw_text([record for record in records([1]) if record.steps == 300])
    assert "> 300" in without_longer and "median steps" not in without_longer


def test_measure_trains_and_scores_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_answers, "CLIPS", (6, 2))
    record = measure(WRONG, 5, 2, tmp_path)
    assert (record.run, record.seed, record.steps, record.steps_to_goal) == (WRONG, 5, 2, None)
    assert 0 <= record.answer_accuracy < 1 and record.cpu
    made = (tmp_path / "5/data/train.jsonl").stat().st_mtime_ns
    measure(WRONG, 5, 1, tmp_path)
    assert (tmp_path / "5/data/train.jsonl").stat().st_mtime_ns == made, "the clips of a seed are rendered once"
    file = open_records(tmp_path / "demo_answers.csv")
    file.put(record)
    assert list(open_records(file.path).records.values()) == [record]


def test_committed_table_is_drawn_from_the_committed_records():
    found = open_records(demo_answers.HERE / "demo_answers.csv").records.values()
    assert draw_text(found) == (demo_answers.HERE / "demo_answers.md").read_text(encoding="utf-8")
    assert {record.seed for record in found} <= set(demo_answers.SEEDS)
