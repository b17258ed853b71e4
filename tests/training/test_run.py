"""Runs as users start them: bad clips, odd clips, Ctrl-C, mistakes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from swim_fast.cli import build_parser
from tests.training.conftest import (
    command,
    environment,
    history,
    record,
    run,
    run_here,
    square_clip,
    text_record,
    write_records,
)


def test_a_run_over_broken_clips_ends_and_reports_them(write_config, tmp_path, caplog):
    records = []
    for number in range(20):
        masks = square_clip(tmp_path / f"{number}.mp4", number)
        records.append(record(f"{number}.mp4", masks))
    (tmp_path / "3.mp4").write_bytes((tmp_path / "3.mp4").read_bytes()[:200])
    (tmp_path / "11.mp4").unlink()
    data = write_records(tmp_path / "data.jsonl", records)
    config = write_config(
        data={"train": [{"path": str(data)}]}, training={"max_steps": 10, "dataloader_num_workers": 2}
    )
    with caplog.at_level("WARNING"):
        run_here(config)
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped-rank0.jsonl").read_text().splitlines()]
    assert len(skipped) == 2
    for number in (3, 11):
        assert any(f"record {number}" in line["problem"] and f"{number}.mp4" in line["problem"] for line in skipped)
        assert f"record {number}" in caplog.text
    assert sum(entry.get("skipped", 0) for entry in history(tmp_path / "run")) == 2
    pairs = sum(entry["pairs_per_step"] for entry in history(tmp_path / "run"))
    rows = pairs / 18 / 2  # two supervised patches of four frames
    assert rows == round(rows) >= 1  # every other clip was trained on


def test_what_contradicts_the_processor_is_told_before_the_weights_are_read(write_config, monkeypatch):
    from transformers import AutoModelForImageTextToText

    from swim_fast.config import load_config
    from swim_fast.errors import UserError
    from swim_fast.training.run import load_model

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # would be a TypeError
    path = write_config()
    for override, message in {
        "data.system_prompt=a<|im_end|>": "system_prompt holds '<.im_end.>', a special token of this model",
        "data.train=[{path: a.jsonl, max_pixels: 700}]": "a.jsonl: min_pixels .* is above max_pixels 700, one of which",
    }.items():
        with pytest.raises(UserError, match=message):
            load_model(load_config(path, [override]))


def test_a_mixture_of_tagged_clips_and_text_alone(write_config, records, tmp_path):
    """Two passes over one file: with its masks, and as questions and answers alone."""
    source = {"path": str(records)}
    runs = {"tagged": [source], "both": [source, {**source, "use_tags": False, "turns": 1, "max_pixels": 28 * 28 * 4}]}
    for name, train in runs.items():
        run_here(
            write_config(
                name, data={"train": train, "system_prompt": ""}, training={"max_steps": -1, "num_train_epochs": 1}
            )
        )
    pairs = {name: sum(entry["pairs_per_step"] for entry in history(tmp_path / name)) for name in runs}
    assert pairs["tagged"] == pairs["both"] > 0
    card = (tmp_path / "both" / "README.md").read_text()
    assert "Give it the same input as in training: no system turn." in card


def test_odd_clips_of_ones_own_train(write_config, tmp_path):
    """1 to 3 frames, odd sizes, an odd number of frames, variable frame rate; masks as hand-drawn polygons."""
    clips = {
        "one.mp4": dict(count=1),
        "two.mp4": dict(count=2),
        "three.mp4": dict(count=3, height=75, width=101),
        "odd.mp4": dict(count=7, height=180, width=120),
        "vfr.mp4": dict(count=5, times=[0, 0.1, 0.5, 0.6, 2.0]),
    }
    records = []
    for seed, (name, options) in enumerate(clips.items()):
        masks = square_clip(tmp_path / name, seed, **options)
        rows, columns = np.nonzero(masks[0])
        left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        polygon = [[int(v) for v in (left, top, right, top, right, bottom, left, bottom)]]
        lines = record(name, masks)
        lines["annotation"] = [{"0": {"segmentation": polygon}}]
        records.append(lines)
    data = write_records(tmp_path / "data.jsonl", records)
    config = write_config(
        data={"train": [{"path": str(data)}], "eval": {"own": {"path": str(data)}}},
        training={"max_steps": 5, "per_device_train_batch_size": 1},
    )
    run_here(config)
    logs = history(tmp_path / "run")
    assert all(entry["pairs_per_step"] > 0 for entry in logs)
    assert not (tmp_path / "run" / "skipped-rank0.jsonl").exists()
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_own_pairs"] > 0


@pytest.mark.parametrize("freeze", [[], pytest.param(["vision_tower", "merger"], marks=pytest.mark.slow)])
def test_ranks_with_and_without_video_stay_in_step(write_config, tmp_path, freeze):
    masks = square_clip(tmp_path / "clip.mp4", 0)
    records = [record("clip.mp4", masks), text_record(0), text_record(1), {"conversations": []}]
    data = write_records(tmp_path / "data.jsonl", records)
    config = write_config(
        model={"freeze": freeze},
        data={"train": [{"path": str(data)}], "eval": {"same": {"path": str(data), "limit": 3}}},
        training={"max_steps": 4, "per_device_train_batch_size": 1},
    )
    run("train", config, ranks=2)
    metrics = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert metrics["eval_same_pairs"] > 0
    logs = history(tmp_path / "run")
    assert sum(entry.get("skipped", 0) for entry in logs) == 2  # the empty record, in each of two epochs


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(write_config, tmp_path):
    config = write_config(training={"max_steps": 400, "dataloader_num_workers": 1})
    process = subprocess.Popen(
        command("train", str(config)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "text_loss" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to workers and decoders as well
    begin = time.monotonic()
    lines.append(process.stdout.read())
    assert process.wait(timeout=120) == 130, "".join(lines)[-3000:]
    assert time.monotonic() - begin < 60
    assert "SIGINT: saving a checkpoint" in "".join(lines)
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert 1 <= step < 400
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with_checkpoint = run("train", config, code=2)
    assert "resume it with --resume" in with_checkpoint
    run("train", config, "--resume", f"training.max_steps={step + 2}")
    assert history(tmp_path / "run")[-1]["step"] == step + 2


def test_trained_checkpoint_is_plain(write_config, tmp_path):
    run_here(write_config())
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P; "
        "f = sys.argv[1]; m, p = M.from_pretrained(f), P.from_pretrained(f); "
        "chat = [{'role': 'user', 'content': [{'type': 'text', 'text': 'What does the square do?'}]}]; "
        "i = p.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True,"
        " return_tensors='pt'); "
        "print(len(p.decode(m.generate(**i, max_new_tokens=4)[0]))); "
        "assert not [n for n in sys.modules if n.startswith('swim')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("data.train=[]", "data.train is empty"),
        ("data.train=[{path: absent.jsonl}]", "absent.jsonl"),
        ("model.path=absent/model", "absent/model"),
        ("attention_loss.layers=[7]", "layer 7 is out of range"),
    ],
)
def test_mistakes_are_told_without_a_traceback(write_config, capsys, override, message):
    from swim_fast.cli import main

    assert main(["train", str(write_config()), override]) == 2
    assert message in capsys.readouterr().err


def test_several_gpus_in_one_process_are_refused_before_anything_is_loaded(write_config, capsys, monkeypatch):
    from swim_fast.cli import main
    from swim_fast.config import load_config
    from swim_fast.training import run as module

    config = str(write_config())
    monkeypatch.setattr(module, "load_model", None)  # would be a TypeError
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4,5")
    monkeypatch.setattr(sys, "argv", ["/bin/swim-fast", "train", config, "data.train=[{path: a b}]"])
    assert main(["train", config]) == 2
    error = capsys.readouterr().err
    assert "sees 4 GPUs" in error and "put CUDA_VISIBLE_DEVICES=2 into the environment" in error
    assert f"(torchrun --nproc-per-node 4 -m swim_fast.cli train {config} 'data.train=[{{path: a b}}]')" in error
    monkeypatch.setattr(sys, "argv", ["own.py"])
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 4 own.py"):
        module.build_trainer(load_config(config))
    module._refuse_data_parallel(load_config(config, ["training.use_cpu=true"]))
    monkeypatch.setenv("LOCAL_RANK", "0")
    module._refuse_data_parallel(load_config(config))


def test_effective_configuration_is_saved(write_config, tmp_path, capsys):
    from swim_fast.config import load_config

    run_here(write_config(attention_loss={"layers": None}), "training.max_steps=1")
    output = capsys.readouterr().out
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert saved.attention_loss.layers == [1]  # what None stood for
    assert saved.training["max_steps"] == 1
    assert f"training on the CPU; configuration: {tmp_path / 'run' / 'config.yaml'}" in output
    assert "criterion" not in output  # the file holds it


def test_a_detached_model_is_an_error_and_not_a_text_only_run(write_config):
    from swim_fast.config import load_config
    from swim_fast.modeling import detach_noun_attention
    from swim_fast.training.run import build_trainer

    trainer = build_trainer(load_config(write_config()))
    detach_noun_attention(trainer.model)
    with pytest.raises(RuntimeError, match="the model answered no map"):
        trainer.train()


def test_a_run_without_any_map_trains_a_stock_model(write_config, tmp_path):
    run_here(write_config(attention_loss=None))
    logs = history(tmp_path / "run")
    assert all("mask_loss" in entry and entry["mask_loss"] == 0 for entry in logs if entry["pairs_per_step"])
    assert all("pointing_accuracy" not in entry for entry in logs)


def test_questions_learn_to_look_at_the_video_without_masks(write_config, tmp_path):
    """AVAR's losses alone, which need no tagged noun: both fall."""
    loss = {"text_weight": 0.0, "mask_weight": 0.0, "image_weight": 0.15, "system_weight": 0.15}
    run_here(write_config(attention_loss=loss, training={"max_steps": 12, "learning_rate": 3e-3}))
    logs = history(tmp_path / "run")
    for name in ("image_loss", "system_loss"):
        values = [entry[name] for entry in logs if name in entry]
        assert len(values) >= 3 and values[-1] < values[0] - 0.05, (name, values)


@pytest.mark.parametrize(
    "choice",
    [
        {"fusion": "none", "criterion": "bce"},
        {"fusion": "none", "prediction": "min_max", "criterion": "dice"},
        {"softmax": "full", "fusion": "product", "prediction": "released", "query_position": "predictor"},
        {"softmax": "causal", "fusion": "product", "prediction": "min_max"},
        {"softmax": "visual", "fusion": "add", "criterion": "mass"},
        {"softmax": "visual", "fusion": "none", "criterion": "klal"},
    ],
)
def test_every_kind_of_mask_loss_trains_and_is_logged(write_config, tmp_path, choice):
    run_here(write_config(attention_loss=choice))
    logs = history(tmp_path / "run")
    assert all(0 <= entry[name] <= 1 for entry in logs for name in ("pointing_accuracy", "mass_in_mask", "soft_iou"))
    assert all(0 < entry["mask_loss"] < 50 for entry in logs)


def test_a_run_is_told_in_lines_and_ends_with_what_to_type_next(write_config, checkpoint, records, tmp_path, capsys):
    from swim_fast.cli import main

    config = write_config(training={"max_steps": 2, "logging_steps": 1})
    source = f"data.eval={{held_out: {{path: {json.dumps(str(records))}, limit: 2}}}}"
    assert main(["train", str(config), source, "training.eval_strategy=epoch"]) == 0
    output = capsys.readouterr().out
    lines = output.partition("step 1/2  loss")[2].splitlines()
    assert lines[1].startswith("step 2/2  loss ") and "'loss'" not in output
    assert any(line.startswith("score on held_out:  loss ") for line in lines)
    assert f"model: {tmp_path / 'run'} " in output
    commands = [shlex.split(line)[1:] for line in lines[lines.index("next:") + 1 :]]
    *others, report = [build_parser().parse_args(words) for words in commands]
    assert all(args.model == str(tmp_path / "run") for args in others) and len(others) == 2
    assert report.runs == [str(tmp_path / "run")]
    describe = build_parser().parse_args(commands[0])
    assert Path(describe.media).is_file() and describe.show[0] in describe.question and "<" not in describe.question
