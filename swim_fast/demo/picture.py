"""The demo's pictures: training curves, and where two models look."""

import json
from pathlib import Path

import numpy as np
import torch

from swim_fast.config import RunConfig


def draw_curves(folders: dict[str, Path], path: Path) -> None:
    """Text loss and held-out pointing accuracy over the steps, a line per run; reads `trainer_state.json` of each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for name, folder in folders.items():
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for axes, suffix in zip(panels, ("text_loss", "pointing_accuracy"), strict=True):
            points = {
                entry["step"]: value
                for entry in history
                for key, value in entry.items()
                if key.startswith("eval_") and key.endswith(suffix)
            }
            axes.plot(points.keys(), points.values(), marker="o", markersize=3, label=name.replace("_", " "))
    for axes, title in zip(panels, ("text loss, held-out clips", "pointing accuracy, held-out clips"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_ylim(0, 1)
    panels[1].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def draw_attention(config: RunConfig, folders: dict[str, Path], path: Path) -> None:
    """One held-out question: frames × {mask, map of each run}, the question in the title.

    The record shown is the first of the evaluation file with the most supervised patches. The map is the fused frame
    map p of the loss (SWIM, arXiv 2605.18018), averaged over the tokens of the noun.

    Args:
        config: names the evaluation file, the layers and the fusion.
        folders: run name → trained checkpoint.
        path: PNG to write.
    """
    from transformers import AutoProcessor

    from swim_fast.data.sample.builder import SampleBuilder
    from swim_fast.data.source.records import RecordFile
    from swim_fast.data.source.tags import strip_tags
    from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid

    source = next(iter(config.data.eval.values()))
    records = RecordFile(source.path, source.media)
    processor = AutoProcessor.from_pretrained(config.model.path)
    builder = SampleBuilder(processor, config.sample_options())
    number, sample = max(
        ((i, builder(record)) for i, record in enumerate(records)), key=lambda pair: (len(pair[1].masks), -pair[0])
    )
    record = records[number]
    patch_size = processor.video_processor.temporal_patch_size
    patches = sorted({sample.patches[start // (height * width)] for _, start, height, width, _ in sample.pairs})
    maps = [_frame_maps(config, folder, sample, processor) for folder in folders.values()]
    columns = []
    for mask, patch in zip(sample.masks, patches, strict=True):
        frame = next(f for f in sample.frames[patch * patch_size :] if f in record.objects[0])
        columns.append(
            HeatmapColumn(
                frame=builder.reader.frames(record, [frame])[0],
                mask=mask.numpy(),
                maps=[found[patch] for found in maps],
                label=f"frame {frame}",
            )
        )
    question, nouns = strip_tags(record.turns[0].text.replace("<video>", "").strip())
    noun = question[slice(*nouns[0])]
    labels = [name.replace("_", " ") for name in folders]
    heatmap_grid(columns, path, title=f"“{question}”  —  attention of “{noun}”", map_labels=labels)


@torch.no_grad()
def _frame_maps(config: RunConfig, folder: Path, sample, processor) -> dict[int, np.ndarray]:
    """Fused map [h, w] per supervised temporal patch, averaged over the rows of the sample."""
    from transformers import AutoModelForImageTextToText

    from swim_fast.data.batch.collation import Collator
    from swim_fast.loss.mask_loss import grid_predictions
    from swim_fast.modeling import attach_noun_attention

    model = attach_noun_attention(AutoModelForImageTextToText.from_pretrained(folder), config.attention_loss.layers)
    batch = Collator(processor)([sample])
    inputs = {key: batch[key] for key in (*sample.inputs, "attention_mask") if key != "labels"}
    outputs = model(**inputs, noun_queries=batch["noun_queries"], use_cache=False)
    found: dict[int, list[np.ndarray]] = {}
    for prediction in grid_predictions(outputs.attentions, batch["mask_targets"], fusion=config.attention_loss.fusion):
        for pair, p in zip(prediction.group.pairs.tolist(), prediction.p.numpy(), strict=True):
            _, start, height, width, _ = sample.pairs[pair]
            found.setdefault(sample.patches[start // (height * width)], []).append(p)
    return {patch: np.mean(values, axis=0) for patch, values in found.items()}
