"""The demo's pictures: training curves, and where two models look."""

import json
from pathlib import Path

from swim_fast.config import RunConfig
from swim_fast.data.source.tags import strip_tags
from swim_fast.viz import charts


def draw_curves(folders: dict[str, Path], path: Path) -> None:
    """Draw held-out pointing and answers over the steps, a line per run; reads its `trainer_state.json`."""
    panels: dict[str, dict] = {"pointing accuracy, held-out clips": {}, "answer accuracy, held-out clips": {}}
    for name, folder in folders.items():
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for suffix, curves in zip(("pointing_accuracy", "answer_accuracy"), panels.values(), strict=True):
            curves[name] = {
                entry["step"]: value
                for entry in history
                for key, value in entry.items()
                if key.startswith("eval_") and key.endswith(suffix)
            }
    charts.draw_curves(path, panels, "optimizer step")


def draw_attention(config: RunConfig, folders: dict[str, Path], path: Path) -> None:
    """Draw frames × {mask, map of each run} of one held-out question, which is the title.

    The record is the first of the evaluation file with the most supervised patches. The map is the fused map p of the
    loss (SWIM, arXiv 2605.18018), averaged over the tokens of the noun.

    Args:
        config: names the evaluation file, the layers and the fusion.
        folders: label of a run → trained checkpoint.
        path: PNG to write.
    """
    from swim_fast.data.sample.builder import SampleBuilder
    from swim_fast.data.source.records import RecordFile
    from swim_fast.demo.answers import choose_inference
    from swim_fast.inference.loading import load_model, load_processor
    from swim_fast.inference.noun_maps import compute_noun_maps
    from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid

    source = next(iter(config.data.eval.values()))
    records = RecordFile.from_source(source)
    processor = load_processor(config.model.path)
    builder = SampleBuilder(processor, config.sampling, config.decoding, config.supervision)
    record, sample = max(((record, builder(record)) for record in records), key=lambda pair: len(pair[1].masks))
    conversation, info = builder.render(record), builder.reader.info(record)
    pixels = builder.reader.frames(record, sample.frames)
    encoding = builder.encode.video(conversation, pixels, sample.frames, info)
    options = choose_inference(config)
    maps = [
        compute_noun_maps(load_model(folder, options), processor, encoding, config.attention_loss)[0]
        for folder in folders.values()
    ]
    patch_size, columns = builder.encode.frames_per_patch(record.kind), []
    for pair in sample.pairs[: len(sample.masks)]:  # of the first token
        patch = sample.patch(pair)
        slots = range(patch * patch_size, (patch + 1) * patch_size)
        shown = max(slot for slot in slots if sample.frames[slot] in record.objects[0])  # supervised in any case
        label = f"frame {sample.frames[shown]}"
        columns.append(
            HeatmapColumn(pixels[shown], sample.masks[pair.mask].numpy(), [found[patch] for found in maps], label)
        )
    (start, end), question = conversation.nouns[0], strip_tags(record.turns[0].text)[0].removeprefix("<video>\n")
    title = f"“{question}”  —  attention of “{conversation.text[start:end]}”"
    heatmap_grid(columns, path, title=title, map_labels=list(folders))
