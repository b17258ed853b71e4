"""Read the folder of a run into the plain values that `swim_fast.viz.run_report` draws."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swim_fast.config import ConfigError, RunConfig, load_config
from swim_fast.errors import OptionError
from swim_fast.files import read_log
from swim_fast.options import Inference
from swim_fast.viz.run_report import RunView, write_run_page

TITLES = {  # of the curves, by the key of the trainer's log
    "text_loss": "Text loss",
    "mask_loss": "Mask loss",
    "pointing_accuracy": "Pointing accuracy",
    "mass_in_mask": "Mass in mask",
    "soft_iou": "Soft IoU",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
}
MAX_SKIPPED = 100  # samples listed


def write_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    clips: int = 8,
    max_new_tokens: int = 64,
    inference: Inference | None = None,
) -> Path:
    """Write a page about runs of `swim-fast train` that needs nothing else, and return its path.

    Args:
        runs: output folders; the clips are those of the first one's `data.eval`.
        out: HTML to write; None: `report.html` in the first folder.
        clips: most clips of the gallery; 0 loads no model.
        max_new_tokens: longest answer.
        inference: how the checkpoints are loaded; the rule of position ids is that of each run.

    Raises:
        OptionError: a folder that is no run.
    """
    folders = [Path(run) for run in runs]
    views, configs = [], []
    for folder, label in zip(folders, _labels(folders), strict=True):
        view, config = _read_run(folder, label)
        views.append(view)
        configs.append(config)
    notes, gallery = [], []
    if clips:
        from swim_fast.report.gallery import build_gallery

        gallery = build_gallery(folders, views, configs, clips, max_new_tokens, inference or Inference(), notes)
    return write_run_page(out or folders[0] / "report.html", views, gallery, notes)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ, the whole path of one that is given twice."""
    parts = [folder.resolve().parts for folder in folders]
    for size in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_one[-size:]) for of_one in parts]
        if len(set(names)) == len(names):
            return names
    raise OptionError("a run is given twice")


def _read_run(folder: Path, label: str) -> tuple[RunView, RunConfig]:
    file = folder / "config.yaml"
    if not file.is_file():
        raise OptionError(f"{folder} is no output folder of swim-fast train: it has no config.yaml")
    try:  # `training` depends on the machine of the run: it is shown as written
        config = load_config(file, ["training={}", "optimization={}"])
    except ConfigError as error:
        raise OptionError(f"{file} cannot be used: {error}") from error
    view = RunView(label, settings=list(_settings(file)))
    view.model = config.model.path
    view.data = [f"train: {source.path}" for source in config.data.train]
    view.data += [f"{name}: {source.path}" for name, source in config.data.eval.items()]
    log = _read_history(folder)
    if not log:
        view.notes.append("There is no log of training (trainer_state.json) here or in a checkpoint: no curves.")
    for key, title in TITLES.items():
        for name, points in _curves(log, key, config.data.eval):
            view.curves.setdefault(title, {})[name] = points
    view.metrics = _last_metrics(log, config.data.eval)
    for path in sorted(folder.glob("skipped-rank*.jsonl")):
        for _, entry in read_log(path):
            view.skipped.append({str(key): str(value) for key, value in entry.items() if value is not None})
    if len(view.skipped) > MAX_SKIPPED:
        view.notes.append(f"{len(view.skipped):,} samples were skipped; the first {MAX_SKIPPED} are listed.")
        view.skipped = view.skipped[:MAX_SKIPPED]
    return view, config


def _settings(file: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield key, value, and if it is changed from the default, the changed ones first."""
    import yaml

    from swim_fast.config import DataConfig, ModelConfig, OptimizationConfig
    from swim_fast.options import AttentionLoss

    written = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    options = {"model": ModelConfig, "data": DataConfig, "optimization": OptimizationConfig}
    rows = []
    for section, values in written.items():
        fields = options.get(section, AttentionLoss if section == "attention_loss" else None)
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            field = fields.model_fields.get(key) if fields else None
            # `training` holds only what the user wrote
            changed = field is None or field.is_required() or value != field.get_default(call_default_factory=True)
            rows.append((f"{section}.{key}".rstrip("."), json.dumps(value, ensure_ascii=False, default=str), changed))
    yield from sorted(rows, key=lambda row: not row[2])


def _read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the trainer's log of the finished run, else of its last checkpoint; [] without any."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    checkpoints.sort(key=lambda path: -int(path.name.split("-")[-1]))
    for at in (folder, *checkpoints):
        try:
            return json.loads((at / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError):
            continue
    return []


def _curves(log: Sequence[dict], key: str, sets) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for name, logged in [("training", key), *((name, f"eval_{name}_{key}") for name in sets)]:
        points = [(entry["step"], entry[logged]) for entry in log if isinstance(entry.get(logged), int | float)]
        if points:
            yield name, points


def _last_metrics(log: Sequence[dict], sets) -> list[tuple[str, str, float]]:
    """Return set, name and value of the last evaluation of each set; times and speeds are left out."""
    found = {}
    for entry in log:
        for name in sets:
            begin = f"eval_{name}_"
            values = {key.removeprefix(begin): value for key, value in entry.items() if key.startswith(begin)}
            found |= {(name, key): value for key, value in values.items() if isinstance(value, int | float)}
    return [
        (name, key.replace("_", " "), value)
        for (name, key), value in found.items()
        if key != "runtime" and not key.endswith("_per_second")
    ]
