"""The demo from end to end, far too short to learn anything."""

import json

import pytest
from PIL import Image

from swim_fast.cli import main
from swim_fast.demo.run import METRICS, RUNS, WITH, WITHOUT, WRONG, run_demo
from swim_fast.demo.texts import all_texts


def test_demo_writes_metrics_and_pictures(tmp_path, capsys):
    folder = tmp_path / "demo"
    overrides = [
        f"model.path={folder}/start",
        f"data.train=[{{path: {folder}/data/train.jsonl}}]",
        f"data.eval={{heldout: {{path: {folder}/data/heldout.jsonl}}}}",
        f"training.output_dir={folder}",
        "training.max_steps=3",
        "training.eval_steps=2",
        "training.per_device_train_batch_size=2",
        "training.dataloader_num_workers=0",
    ]
    report = run_demo("configs/demo.yaml", overrides, train_clips=4, heldout_clips=2)
    assert report == json.loads((folder / "metrics.json").read_text())
    assert set(report) == {WITH, WITHOUT, WRONG, "seconds"} == {*RUNS, "seconds"}
    for name in RUNS:
        assert set(report[name]) == {*METRICS, "steps_to_goal"} and report[name]["steps_to_goal"] is None
        assert all(0 <= report[name][key] <= 1 for key in METRICS)
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        answers = {log["step"]: log["eval_heldout_answer_accuracy"] for log in history if "answer_accuracy" in str(log)}
        assert list(answers) == [2, 3] and round(answers[3], 4) == report[name]["answer_accuracy"]
    assert len({report[name]["mass_in_mask"] for name in RUNS}) == len(RUNS)
    page = (folder / "report.html").read_text()
    assert all(f'data-run="{name}"' in page for name in RUNS) and "is not shown" not in page
    for picture in ("attention.png", "curves.png"):
        width, height = Image.open(folder / picture).size
        assert width > 400 and height > 200
    assert "pointing accuracy" in capsys.readouterr().out
    assert any((folder / WITH).rglob("events.out.tfevents*")), "no TensorBoard log"


@pytest.mark.parametrize("words", [["training.max_steps=4"], ["--train-clips", "24", "training.max_steps=4"]])
def test_overrides_need_no_file_before_them(monkeypatch, words):
    runs = []
    monkeypatch.setattr("swim_fast.demo.run.run_demo", lambda config, overrides, **_: runs.append((config, overrides)))
    assert main(["demo", *words]) == 0
    assert runs == [("demo", ["training.max_steps=4"])]


def test_texts_are_plain():
    texts = list(all_texts())
    assert len(texts) == 42
    assert not any("<ins>" in text for text in texts)
