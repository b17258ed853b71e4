import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from swim_fast.data.batch.collation import Collator
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.loss.mask_loss import MaskTargets, mask_alignment_loss
from swim_fast.options import Sampling
from swim_kernels import NounQueries
from tests.data.conftest import box, builder_of, rle

H, W = 64, 96
NOT_FOR_THE_MODEL = ("labels", "noun_queries", "mask_targets", "samples", "problems", "notes")


@pytest.fixture(scope="module")
def build(processor):
    builder = builder_of(processor, max_frames=8, softmax="causal")
    yield builder
    builder.reader.close()


@pytest.fixture(scope="module")
def build_frames(processor):
    builder = builder_of(processor, max_frames=8)
    yield builder
    builder.reader.close()


@pytest.fixture
def records(make_record, clip, tmp_path):
    """Annotated video, text, annotated image, video without masks, video with two nouns in two turns."""
    from PIL import Image

    Image.new("RGB", (120, 60), (200, 30, 30)).save(tmp_path / "a.png")
    first, second = rle(box(H, W, 0, 20, 0, 30)), rle(box(H, W, 30, 60, 50, 90))
    image_mask = rle(box(60, 120, 10, 50, 10, 50))
    return [
        make_record("A <ins>dog</ins>?", "Yes.", kind="video", media=clip(12), objects=({3: first, 9: second},)),
        make_record("Which of the two cups moves first?", "The blue cup moves first, then the white cup."),
        make_record("A <ins>cup</ins>?", "No.", kind="image", media=tmp_path / "a.png", objects=({0: image_mask},)),
        make_record("What?", "This.", kind="video", media=clip(5, 1)),
        make_record(
            "One <ins>dog</ins>.", "Yes.", "Its ball?", "The red <ins>ball</ins>.",
            kind="video", media=clip(3, 30, 96, 64), objects=({0: rle(box(96, 64, 0, 20, 0, 30))}, {2: {}, 1: None}),
        ),
    ]  # fmt: skip


def inputs_of(batch):
    return {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}


def test_mixed_batch(build, processor, records):
    samples = [build(record) for record in records]
    for number, sample in enumerate(samples):
        sample.tags_without_mask = number
    error = DataError("is broken", source="file.jsonl", record=7)
    batch = Collator(processor)([*samples[:2], error, *samples[2:]])
    lengths = [len(sample.inputs["input_ids"]) for sample in samples]
    assert batch["input_ids"].shape == (5, max(lengths))
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100, "mm_token_type_ids": 0}
    for number, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (max(lengths) - length)
        for key, value in padding.items():
            assert torch.equal(batch[key][number, :length], sample.inputs[key])
            assert (batch[key][number, length:] == value).all()
    videos, image = [samples[0], samples[3], samples[4]], samples[2]
    assert torch.equal(batch["video_grid_thw"], torch.cat([sample.inputs["video_grid_thw"] for sample in videos]))
    patches = [sample.inputs["pixel_values_videos"].patches() for sample in videos]
    assert torch.equal(batch["pixel_values_videos"], torch.cat(patches))
    assert list(batch["second_per_grid_ts"]) == [sample.inputs["second_per_grid_ts"].item() for sample in videos]
    assert torch.equal(batch["image_grid_thw"], image.inputs["image_grid_thw"])
    assert torch.equal(batch["pixel_values"], image.inputs["pixel_values"].patches())
    assert batch["samples"] == [sample.name for sample in samples]
    assert batch["problems"] == ["file.jsonl, record 7: is broken"]
    assert batch["notes"] == [] and batch["counts"].tags_without_mask == 0 + 1 + 2 + 3 + 4


def test_rows_over_patches_of_a_mixed_batch(build_frames, processor, records):
    samples = [build_frames(record) for record in records]
    batch = Collator(processor)(samples)
    queries, targets = batch["noun_queries"], batch["mask_targets"]
    queries.check(*batch["input_ids"].shape)
    targets.check(rows=len(queries), columns=queries.key_sets.shape[1])
    assert queries.over == "set" and queries.sequence.tolist() == [0, 0, 2, 4] and len(queries.key_sets) == 4
    assert targets.row.tolist() == [0, 1, 2, 3] and targets.start.tolist() == [0] * 4
    for row, (sequence, key_set) in enumerate(zip(queries.sequence, queries.key_set, strict=True)):
        keys = queries.key_sets[key_set]
        assert (keys >= 0).sum() == targets.height[row] * targets.width[row]
        assert batch["mm_token_type_ids"][sequence][keys[keys >= 0]].all()
        assert (int(queries.key_start[row]), int(queries.key_end[row])) == (int(keys[0]), int(keys.max()) + 1)


def test_one_kind_of_softmax_a_batch(build, build_frames, processor, records):
    assert Collator(processor)([build_frames(records[0]), build(records[1])])["noun_queries"].over == "set"
    with pytest.raises(ValueError, match="one kind of softmax"):
        Collator(processor)([build_frames(records[0]), build(records[2])])


def test_queries_and_targets_of_a_mixed_batch(build, processor, records):
    samples = [build(record) for record in records]
    batch = Collator(processor)(samples)
    queries, targets = batch["noun_queries"], batch["mask_targets"]
    assert isinstance(queries, NounQueries) and isinstance(targets, MaskTargets)
    queries.check(*batch["input_ids"].shape)
    targets.check(rows=len(queries), columns=queries.key_sets.shape[1])
    decode = processor.tokenizer.decode
    nouns = [decode(batch["input_ids"][b, t]) for b, t in zip(queries.sequence, queries.position, strict=True)]
    assert nouns == [" dog", " cup", " dog"]  # the ball has no mask
    assert queries.sequence.tolist() == [0, 2, 4]
    assert queries.key_end.tolist() == [t + 1 for t in queries.position.tolist()]
    assert queries.key_start.tolist() == [0, 0, 0]
    assert queries.key_set.tolist() == [0, 1, 2]
    for g, number in enumerate((0, 2, 4)):
        visual = torch.nonzero(batch["mm_token_type_ids"][number]).flatten()
        assert queries.key_sets[g].tolist() == visual.tolist() + [-1] * (queries.key_sets.shape[1] - len(visual))

    pairs = [samples[number].pairs for number in (0, 2, 4)]
    assert [len(p) for p in pairs] == [2, 1, 1]
    assert targets.row.tolist() == [0, 0, 1, 2]
    assert targets.start.tolist() == [pair[1] for part in pairs for pair in part]
    assert targets.height.tolist() == [2, 2, 2, 3]
    assert targets.width.tolist() == [3, 3, 4, 2]
    assert targets.mask.tolist() == [0, 1, 2, 3]
    sources = [
        box(H, W, 0, 20, 0, 30),
        box(H, W, 30, 60, 50, 90),
        box(60, 120, 10, 50, 10, 50),
        box(96, 64, 0, 20, 0, 30),
    ]
    assert all(np.array_equal(mask, source) for mask, source in zip(targets.masks, sources, strict=True))


def test_patches_lie_where_the_mask_is(build, processor, make_record, clip):
    """Seen from the outside: a map that is bright exactly in the masked cells has nearly no loss."""
    objects = ({4: rle(box(H, W, 0, 32, 0, 32)), 11: rle(box(H, W, 32, 64, 64, 96))},)
    sample = build(make_record("The <ins>dog</ins>?", "b", kind="video", media=clip(12), objects=objects))
    numbered, batch = sample.frames, Collator(processor)([sample])
    frames, (height, width) = build.sampling.max_frames, (2, 3)
    assert batch["video_grid_thw"].tolist() == [[frames // 2, 2 * height, 2 * width]]
    maps = torch.full((1, frames // 2 * height * width), 1e-6)
    targets = batch["mask_targets"]
    assert {"cell_targets", "groups", "pairs"} <= vars(targets).keys(), "made in the worker"
    frame_of_4, frame_of_11 = (numbered.index(number) // 2 for number in (4, 11))
    maps[0, frame_of_4 * height * width] = 1  # top left cell
    maps[0, frame_of_11 * height * width + 5] = 1  # bottom right cell
    right = mask_alignment_loss([maps], targets, resolution="grid")
    wrong = mask_alignment_loss([maps.flip(1)], targets, resolution="grid")
    assert right < 0.01 < 1 < wrong


def test_the_model_takes_the_batch(build, processor, records, model):
    batch = Collator(processor)([build(record) for record in records])
    with torch.no_grad():
        outputs = model(**inputs_of(batch))
        assert outputs.logits.shape[:2] == batch["input_ids"].shape
        assert torch.isfinite(outputs.logits).all()
        # Each sample alone gives what it gives in the batch: padding and order of the visual tensors are right.
        for number, record in enumerate(records):
            alone = Collator(processor)([build(record)])
            logits = model(**inputs_of(alone)).logits[0]
            torch.testing.assert_close(outputs.logits[number, : len(logits)], logits, rtol=1e-3, atol=1e-4)
        loss = model(**inputs_of(batch), labels=batch["labels"]).loss
    assert torch.isfinite(loss)


@pytest.mark.parametrize("items", [[], [DataError("is broken", source="a.jsonl", record=1)]])
def test_placeholder_batch(processor, model, items):
    batch = Collator(processor)(items)
    assert (batch["labels"] == -100).all() and batch["attention_mask"].all()
    assert len(batch["noun_queries"]) == len(batch["mask_targets"]) == 0
    assert batch["samples"] == batch["notes"] == []
    assert batch["problems"] == [str(item) for item in items]
    batch["noun_queries"].check(*batch["input_ids"].shape)
    logits = model(**inputs_of(batch)).logits
    logits.sum().backward()
    assert logits.shape[:2] == batch["input_ids"].shape
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_notes_name_the_sample(processor, records):
    text = len(SampleBuilder(processor)(records[3]).inputs["input_ids"]) - 18
    sample = SampleBuilder(processor, Sampling(max_tokens=text + 6))(records[3])
    batch = Collator(processor)([sample])
    assert batch["notes"] == [
        f"file.jsonl:3 (name): thinned from 6 to 2 frames: {text + 18} tokens > max_tokens {text + 6}"
    ]


def test_collator_without_pad_token(processor):
    other = pickle.loads(pickle.dumps(processor))
    other.tokenizer.pad_token = None
    batch = Collator(other)([])
    assert batch["input_ids"].tolist() == [[other.tokenizer.eos_token_id]]


class ManyMasks(torch.utils.data.Dataset):
    """Four samples with masks of their own."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dataclasses.replace(self.sample, masks=[mask.clone() for mask in self.sample.masks])


def test_masks_do_not_use_up_the_open_files(processor, make_record, clip):
    """A worker sends each tensor as an open file, and where the limit is reached the loader hangs."""
    objects = ({frame: rle(box(H, W, 0, 20, 0, 30)) for frame in range(40)},)
    record = make_record("A <ins>dog</ins>?", "b", kind="video", media=clip(40), objects=objects)
    sample = SampleBuilder(processor, Sampling(max_frames=40))(record)
    assert len(sample.masks) == 20
    loader = DataLoader(ManyMasks(sample), batch_size=2, num_workers=1, collate_fn=Collator(processor))
    before = len(os.listdir("/proc/self/fd"))
    batches = list(loader)
    assert [len(batch["mask_targets"].masks) for batch in batches] == [40, 40]
    assert len(os.listdir("/proc/self/fd")) - before < 2 * 40
