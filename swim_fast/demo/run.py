"""The demo: render clips, train a tiny model twice from the same start, compare, draw."""

import json
import shutil
import time
from pathlib import Path

from swim_fast.config import RunConfig, load_config
from swim_fast.files import atomic_write

WITH, WITHOUT = "with_attention_loss", "text_loss_only"
METRICS = ("pointing_accuracy", "mass_in_mask", "soft_iou", "answer_accuracy")


def run_demo(config_path: str, overrides: list[str] = (), train_clips: int = 1000, heldout_clips: int = 60) -> dict:
    """Run the whole demo in the folder `training.output_dir` of a configuration.

    Writes `metrics.json`, `curves.png` and `attention.png` beside the two trained checkpoints, replacing those of an
    earlier run.

    Returns:
        Contents of `metrics.json`: per run the held-out pointing accuracy, mass in mask, soft IoU and answer accuracy,
        and the seconds of the whole demo.
    """
    import torch

    from swim_fast.demo.clips import write_demo_data
    from swim_fast.demo.picture import draw_attention, draw_curves
    from swim_fast.demo.texts import all_texts
    from swim_fast.demo.tiny_model import build_checkpoint

    begin = time.perf_counter()
    torch.set_num_threads(1)  # too small a model for more; the other core decodes
    config = load_config(config_path, overrides)
    folder = Path(config.training["output_dir"])
    seed = config.training.get("seed", 0)
    write_demo_data(folder / "data", seed=seed, train_clips=train_clips, heldout_clips=heldout_clips)
    build_checkpoint(config.model.path, all_texts(), seed=seed)

    report, folders = {}, {}
    for name, mask_weight in ((WITH, config.attention_loss.mask_weight), (WITHOUT, 0.0)):
        print(f"\n{name.replace('_', ' ')}\n", flush=True)
        folders[name] = folder / name
        report[name] = _train_and_score(_variant(config, folders[name], mask_weight))
    draw_curves(folders, folder / "curves.png")
    draw_attention(config, folders, folder / "attention.png")
    report["seconds"] = round(time.perf_counter() - begin, 1)
    with atomic_write(folder / "metrics.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    _print_table(report)
    print(f"{folder / 'metrics.json'}  {folder / 'attention.png'}  {folder / 'curves.png'}  {report['seconds']:.0f} s")
    return report


def _variant(config: RunConfig, output: Path, mask_weight: float) -> RunConfig:
    shutil.rmtree(output, ignore_errors=True)  # of an earlier demo
    return config.replace(
        training={**config.training, "output_dir": str(output)},
        attention_loss=config.attention_loss.replace(mask_weight=mask_weight),
    )


def _train_and_score(config: RunConfig) -> dict[str, float]:
    from swim_fast.data.source.records import RecordFile
    from swim_fast.demo.answers import choose_inference, compute_accuracy
    from swim_fast.inference.loading import load_checkpoint
    from swim_fast.training.run import train

    metrics = train(config)
    (name, source), *_ = config.data.eval.items()
    checkpoint = load_checkpoint(config.training["output_dir"], choose_inference(config))
    records = RecordFile.from_source(source)
    accuracy = compute_accuracy(checkpoint, records, config.sampling, config.decoding)
    scores = {key: metrics[f"eval_{name}_{key}"] for key in METRICS[:-1]} | {"answer_accuracy": accuracy}
    return {key: round(value, 4) for key, value in scores.items()}


def _print_table(report: dict) -> None:
    print(f"\n{'held-out clips':<24}" + "".join(f"{key.replace('_', ' '):>20}" for key in METRICS))
    for name in (WITH, WITHOUT):
        print(f"{name.replace('_', ' '):<24}" + "".join(f"{report[name][key]:>20.3f}" for key in METRICS))
