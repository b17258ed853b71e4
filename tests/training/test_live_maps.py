"""Maps of held-out samples in TensorBoard and W&B: which, of what, at which steps, and with several ranks."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from swim_fast.config import load_config
from swim_fast.data.batch.collation import Collator
from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.records import Turn
from swim_fast.inference.loading import load_checkpoint
from swim_fast.inference.noun_maps import compute_noun_maps
from swim_fast.inference.prompt import encode_question
from swim_fast.options import Sampling, Source
from swim_fast.training import live_maps
from swim_fast.training.live_maps import LiveMaps, spread
from swim_fast.training.run import build_trainer
from tests.training.conftest import record, run, run_here, square_clip, text_record, write_records


def pictures(folder) -> dict[str, dict[int, np.ndarray]]:
    """Return the images of a run's event files by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    found: dict[str, dict[int, np.ndarray]] = {}
    files = list(folder.rglob("events.out.tfevents.*"))
    for file in files:
        events = EventAccumulator(str(file), size_guidance={IMAGES: 0})
        events.Reload()
        for name in events.Tags()["images"]:
            for event in events.Images(name):
                image = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
                found.setdefault(name, {})[event.step] = np.asarray(image)
    return found


@pytest.fixture
def shown(write_config, records):
    """A configuration whose eight held-out records, two of them of text alone, are evaluated at both of its steps."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "report_to": "tensorboard"}
    data = {"eval": {"heldout": {"path": str(records)}, "plain": {"path": str(records), "use_tags": False}}}
    return write_config("shown", data=data, training=steps)


def test_event_files_hold_a_picture_of_each_sample_and_evaluation(shown, tmp_path, records, monkeypatch):
    drawn = []
    right = live_maps.heatmap_grid
    monkeypatch.setattr(
        live_maps, "heatmap_grid", lambda columns, **how: drawn.append(columns) or right(columns, **how)
    )
    run_here(shown, "data.live_maps=2", "data.max_frames=6")  # all frames: a question has no annotated ones
    found = pictures(tmp_path / "shown")
    assert {name: list(steps) for name, steps in found.items()} == {
        "maps/heldout/0": [1, 2],
        "maps/heldout/5": [1, 2],  # records 3 and 4 are of text alone
    }
    for steps in found.values():
        assert steps[1].shape == steps[2].shape and min(steps[1].shape[:2]) > 300
        assert (steps[1] != steps[2]).any()

    # The last pictures are those of the trained model, as `describe --show` computes them.
    model, processor = load_checkpoint(tmp_path / "shown", device="cpu")
    builder = SampleBuilder(processor, Sampling(max_frames=6))
    loss = load_config(shown).attention_loss
    assert len(drawn) == 4
    prompt = encode_question(builder, records.parent / "0.mp4", "video", "What does the square do?", [(14, 20)])
    (maps,) = compute_noun_maps(model, processor, prompt.encoding, loss)
    (column,) = drawn[2]  # of its two masks one is of a frame with an even number
    assert column.label == "frame 0" and column.mask.sum() == 32 * 32
    np.testing.assert_allclose(column.maps[0], maps[0], atol=1e-5)


@pytest.mark.parametrize("changes", [["data.live_maps=0"], ["training.report_to=none"], ["attention_loss=null"]])
def test_nothing_is_computed_where_nothing_is_shown(shown, changes, monkeypatch):
    trainer = build_trainer(load_config(shown, changes))
    monkeypatch.setattr(trainer, "compute_maps", None)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LiveMaps):
            callback._compute_maps = None
    trainer.evaluate()


class Log(live_maps.WandbCallback):
    """W&B's callback with a stand-in for its library."""

    def __init__(self):
        self.logged = []
        self._wandb = types.SimpleNamespace(log=self.logged.append, Image=lambda array, caption: (array, caption))


def make_callback(folder, lines, count, tracker, options):
    """Return the callback on a set of these lines, and a list of the batches that it asks maps of."""
    from transformers import AutoProcessor

    checkpoint, loss = options
    builder = SampleBuilder(AutoProcessor.from_pretrained(checkpoint), Sampling(max_frames=4))
    data = SwimDataset([Source(path=str(write_records(folder / "set.jsonl", lines)))], builder)
    asked = []

    def compute(samples):
        asked.append(samples)
        if not samples:
            return (), None
        batch = Collator(builder.encode.processor, frames=True)(samples)
        queries = batch["noun_queries"]
        import torch

        maps = torch.rand(len(queries.position), queries.key_sets.shape[1], generator=torch.Generator().manual_seed(1))
        return [maps], batch["mask_targets"]

    return LiveMaps(count, {"set": data}, loss, compute, lambda: [tracker]), asked


@pytest.fixture
def options(checkpoint, write_config):
    return checkpoint, load_config(write_config()).attention_loss


def evaluate(callback, step, first=True, report_to=("wandb",)):
    args = types.SimpleNamespace(report_to=list(report_to), dataloader_num_workers=1)
    callback.on_evaluate(args, types.SimpleNamespace(global_step=step, is_world_process_zero=first), None)


def test_wandb_gets_the_same_pictures(tmp_path, options):
    lines = [text_record(0), record("0.mp4", square_clip(tmp_path / "0.mp4", 0))]
    tracker = Log()
    callback, asked = make_callback(tmp_path, lines, 1, tracker, options)
    for step in (5, 5, 10):  # the second set of the same evaluation draws nothing again
        evaluate(callback, step)
    assert [entry["train/global_step"] for entry in tracker.logged] == [5, 10] and len(asked) == 2
    picture, caption = tracker.logged[0]["maps/set/1"]
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert caption == "“square” in “What does the square do?”"


def test_every_rank_computes_as_often_whatever_it_can_read(tmp_path, options, caplog):
    """A forward may be collective: a rank that cannot read a clip, or draws nothing, takes part all the same."""
    masks = square_clip(tmp_path / "0.mp4", 0)
    lines = [record("0.mp4", masks), record("gone.mp4", masks), text_record(0)]
    counts = []
    for first in (True, False):
        tracker = Log()
        callback, asked = make_callback(tmp_path, lines, 8, tracker, options)
        evaluate(callback, 1, first)
        counts.append([len(samples) for samples in asked])
        assert len(tracker.logged) == first
    assert counts == [[1, 0, 0]] * 2


def test_a_sample_that_another_rank_cannot_read_is_not_drawn(tmp_path, options, caplog):
    tracker = Log()
    callback, _ = make_callback(tmp_path, [record("0.mp4", square_clip(tmp_path / "0.mp4", 0))], 1, tracker, options)
    empty = Collator(callback._places[0].data.builder.encode.processor)([])
    callback._compute_maps = lambda samples: ((), empty["mask_targets"])
    evaluate(callback, 1)
    assert tracker.logged == [] and "no picture of" in caplog.text


def test_samples_are_spread_evenly(tmp_path, options):
    builder = SampleBuilder.__new__(SampleBuilder)
    lines = [text_record(0)] * 7
    path = write_records(tmp_path / "seven.jsonl", lines)
    two = SwimDataset([Source(path=str(path), limit=2)], builder)
    seven = SwimDataset([Source(path=str(path))], builder)
    untagged = SwimDataset([Source(path=str(path), use_tags=False)], builder)
    found = [(place.name, place.indices) for place in spread(3, {"a": two, "none": untagged, "b": seven})]
    assert found == [("a", range(2)), ("b", range(1, 4)), ("b", range(4, 7))]
    assert [place.indices for place in spread(9, {"a": two})] == [range(1), range(1, 2)]
    assert spread(4, {"none": untagged}) == []


def test_the_title_names_the_noun_of_its_turn():
    turns = (Turn("user", "<video>\nIs the <ins>dog</ins> here?"), Turn("assistant", "The <ins>cat</ins> is."))
    record = types.SimpleNamespace(turns=turns)
    assert live_maps._title(record, 0) == "“dog” in “Is the dog here?”"
    assert live_maps._title(record, 1) == "“cat” in “The cat is.”"


@pytest.mark.parametrize(
    "deepspeed",
    ["", pytest.param("configs/deepspeed/zero3.json", marks=[pytest.mark.slow, pytest.mark.needs("deepspeed")])],
)
def test_two_ranks_draw_once(shown, tmp_path, deepspeed):
    extra = [f"training.deepspeed={deepspeed}"] if deepspeed else []
    run("train", shown, "training.max_steps=1", *extra, ranks=2)
    found = pictures(tmp_path / "shown")
    assert len(found) == 4 and all(list(steps) == [1] for steps in found.values())
