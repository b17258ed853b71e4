"""The demo: render clips, train a tiny model three times from the same start, compare, draw."""

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

from swim_fast.config import RunConfig, load_config
from swim_fast.demo.clips import DemoData
from swim_fast.files import atomic_write
from swim_fast.options import Source

WITH, WITHOUT, WRONG = "with_attention_loss", "text_loss_only", "control_wrong_masks"
RUNS = {WITH: "attention loss", WITHOUT: "text loss only", WRONG: "masks of another object"}
METRICS = ("pointing_accuracy", "mass_in_mask", "soft_iou", "answer_accuracy")
GOAL = 0.85  # answer accuracy whose first step is reported


def run_demo(config_path: str, overrides: list[str] = (), train_clips: int = 800, heldout_clips: int = 60) -> dict:
    """Run the whole demo in the folder `training.output_dir` of a configuration.

    Writes `metrics.json`, `report.html`, `curves.png` and `attention.png` beside the three trained checkpoints, in
    place of those of an earlier run.

    Returns:
        Contents of `metrics.json`: the scores of `train_run` for each of `RUNS`, and the seconds of the whole demo.
    """
    import torch

    from swim_fast.demo.answers import choose_inference
    from swim_fast.demo.picture import draw_attention, draw_curves
    from swim_fast.report.run import write_report
    from swim_fast.training.progress import look_at

    begin = time.perf_counter()
    torch.set_num_threads(1)  # too small a model for more; the other core decodes
    config = load_config(config_path, overrides)
    folder = Path(config.training["output_dir"])
    _head(0, "rendering clips")
    data = prepare(config, train_clips, heldout_clips)
    report, folders = {}, {}
    for number, (name, label) in enumerate(RUNS.items(), 1):
        _head(number, f"training: {label}")
        run = configure(config, name, data)
        folders[name] = Path(run.training["output_dir"])
        report[name] = train_run(run)
    _head(len(RUNS) + 1, "drawing")
    labelled = {label: folders[name] for name, label in RUNS.items()}
    draw_curves(labelled, folder / "curves.png")
    draw_attention(config, labelled, folder / "attention.png")
    write_report(list(folders.values()), folder / "report.html", inference=choose_inference(config))
    report["seconds"] = round(time.perf_counter() - begin, 1)
    with atomic_write(folder / "metrics.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    print(_summary(report, folder, look_at(Source(path=str(data.heldout)))))
    return report


def prepare(config: RunConfig, train_clips: int, heldout_clips: int) -> DemoData:
    """Write clips, records and the checkpoint that all runs start from; all follow from `training.seed`."""
    from swim_fast.demo.clips import write_demo_data
    from swim_fast.demo.texts import all_texts
    from swim_fast.demo.tiny_model import build_checkpoint

    seed, folder = config.training.get("seed", 0), Path(config.training["output_dir"])
    data = write_demo_data(folder / "data", seed=seed, train_clips=train_clips, heldout_clips=heldout_clips)
    build_checkpoint(config.model.path, all_texts(), seed=seed)
    return data


def configure(config: RunConfig, name: str, data: DemoData) -> RunConfig:
    """Return the configuration of one of `RUNS`, in a folder of its own, which is emptied."""
    output = Path(config.training["output_dir"]) / name
    shutil.rmtree(output, ignore_errors=True)  # of an earlier demo
    changes = {"training": {**config.training, "output_dir": str(output)}}
    if name == WITHOUT:
        changes["attention_loss"] = config.attention_loss.replace(mask_weight=0.0)
    if name == WRONG:
        train = [source.replace(path=str(data.wrong_masks)) for source in config.data.train]
        changes["data"] = config.data.replace(train=train)
    return config.replace(**changes)


def train_run(config: RunConfig) -> dict[str, float | None]:
    """Train, and score the checkpoint on the held-out clips.

    Returns:
        The `METRICS`, of which the answers are those of the stock model that the checkpoint loads as; and the first
        evaluated step at which `GOAL` of the answers were right, None if there was none.
    """
    from swim_fast.demo.answers import AnswersOverSteps, HeldOutAnswers, choose_inference
    from swim_fast.inference.loading import load_checkpoint
    from swim_fast.training.run import train

    answers = HeldOutAnswers.from_config(config)
    over_steps = AnswersOverSteps(answers)
    (name, _), *_ = config.data.eval.items()
    metrics = train(config, callbacks=[over_steps])
    model, _ = load_checkpoint(config.training["output_dir"], choose_inference(config))
    scores = {key: metrics[f"eval_{name}_{key}"] for key in METRICS[:-1]} | {METRICS[-1]: answers.score(model)}
    steps = [step for step, accuracy in over_steps.accuracies.items() if accuracy >= GOAL]
    return {key: round(value, 4) for key, value in scores.items()} | {"steps_to_goal": min(steps, default=None)}


def _head(number: int, text: str) -> None:
    print(f"\n{number + 1}/{len(RUNS) + 2} {text}\n", flush=True)


def _summary(report: dict, folder: Path, describe: list[str]) -> str:
    """Return the table of the runs, what was made, and what to type next."""
    lines = [f"{'held-out clips':<24}" + "".join(f"{key.replace('_', ' '):>19}" for key in METRICS)]
    for name, label in RUNS.items():
        lines.append(f"{label:<24}" + "".join(f"{report[name][key]:>19.3f}" for key in METRICS))
    program = sys.argv[0] if Path(sys.argv[0]).name == "swim-fast" else "python -m swim_fast"
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"made in {report['seconds']:.0f} s, in {folder}:",
            "  report.html      where every word looks, and what each model answers: open it in a browser",
            "  attention.png    where the models look when they are asked about a held-out clip",
            "  curves.png       pointing and answers over the steps",
            f"  {WITH}  and the other runs: plain checkpoints, with logs for TensorBoard",
            "",
            "next:",
            f"  {program} {shlex.join(describe)} \\",
            f"      --model {folder / WITH} --out {folder / 'asked.png'}",
            f"  {program} data show {folder / 'data' / 'heldout.jsonl'} 0 --model {folder / 'start'}",
            f"  tensorboard --logdir {folder}",
        ]
    )
