"""The way of a sample through a loader's worker, part by part: what the loader's speed is made of.

One process does what a worker does, with one thread, so that the parts add up to the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.input import LOADED_RECORDS, one_thread, processor_of
from benchmarks.training.material import SIZES, Clip, write_checkpoint, write_records
from swim_fast.data.batch import collation as batch_collation
from swim_fast.data.batch.collation import Collator
from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.batch.positions import PositionIds
from swim_fast.data.sample import builder as sample_builder
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.masks import Mask
from swim_fast.data.source.records import RecordFile
from swim_fast.data.video.reader import _Child
from swim_fast.families.patches import PatchLayout
from swim_fast.loss.targets import MaskTargets
from swim_fast.options import Sampling, Source

# Parts in the order of a sample's way, and what each is made of.
PARTS = {
    "reading the record": "json and checks of its text",
    "decoding": "the decoder, in its child process, for which the worker waits",
    "moving frames": "bytes of the source's frames through a pipe, two copies",
    "resizing": "torchvision's antialiased filter, equal to the processor's to the bit",
    "text": "chat template and tokenizer of the model, twice: to count the tokens, and with the visual ones",
    "masks: reading": "run-length codes to runs",
    "masks: pixels": "runs to bytes at the source's size, their transposition, unions; rows of nouns",
    "masks: targets": "packing to bits, the share of each cell",
    "position ids": "the model's own function",
    "joining": "a batch of one sample: label positions, noun queries",
    "handing over": "bytes of the batch into new pages of shared memory, one copy",
    "the rest": "choice of frames, and what lies between the parts",
}


class Stopwatch:
    """Adds up the time of named parts; a part within another counts for itself alone.

    Attributes:
        seconds: by part.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._book(name)
        try:
            yield
        finally:
            self._book(None)

    def _book(self, entered: str | None) -> None:
        """Add the time since the last change to the part that it belonged to, and enter or leave one."""
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now
        if entered is None:
            self._parts.pop()
        else:
            self._parts.append(entered)

    def timed(self, function: Callable, name: str) -> Callable:
        def call(*arguments, **keywords):
            with self.part(name):
                return function(*arguments, **keywords)

        return call


@contextlib.contextmanager
def _watched(watch: Stopwatch, places: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
    """Time attributes of modules, classes and objects while the block runs: (owner, attribute, part)."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    try:
        for owner, name, part in places:
            setattr(owner, name, watch.timed(getattr(owner, name), part))
        yield
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds of a sample by part, the mean over the samples; one of every round."""

    name: str
    samples: int
    decoded: int  # bytes of a sample's frames as they are decoded, the mean
    parts: dict[str, list[float]]


def measure_profile(
    folder: Path, name: str, clips: Sequence[Clip], records: int = LOADED_RECORDS, rounds: int = 5
) -> Profile:
    """Profile the samples of `measure_loading`, packed one to a batch; the decoder has seen each clip before."""
    from transformers import AutoConfig

    checkpoint = write_checkpoint(folder / "tiny", SIZES["tiny"])
    each = max(1, records // len(clips))
    path = write_records(folder / f"{name}.jsonl", clips, answers=[1] * each)
    processor = processor_of(checkpoint)
    builder = SampleBuilder(processor, Sampling(max_frames=32))
    dataset = SwimDataset([Source(path=str(path))], builder)
    positions = PositionIds(AutoConfig.from_pretrained(checkpoint))
    collator = Collator(processor, positions, pack=True, frames=True)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(rounds + 1):
        watch, decoded = Stopwatch(), 0
        with one_thread(), _watched(watch, _places(builder, collator)):
            for index in order:
                with watch.part("the rest"):
                    sample = dataset[index]
                    batch = collator([sample])
                    with watch.part("handing over"):
                        ForkingPickler(io.BytesIO()).dump(batch)
                assert not batch["problems"] and len(batch["mask_targets"])
                clip = clips[index // each]
                decoded += 3 * clip.height * clip.width * len(sample.frames)
        if number:
            for part, values in seconds.items():
                values.append(watch.seconds[part] / len(order))
    builder.reader.close()
    return Profile(name, len(order), decoded // len(order), seconds)


def _places(builder: SampleBuilder, collator: Collator) -> list[tuple[Any, str, str]]:
    return [
        (RecordFile, "__getitem__", "reading the record"),
        (_Child, "_head", "decoding"),
        (_Child, "ask", "moving frames"),  # what it does beside waiting for an answer's head, and resizing
        (PatchLayout, "resize", "resizing"),
        (builder, "render", "text"),
        (builder.encode, "_encode", "text"),
        (builder.encode, "text_offsets", "text"),
        (sample_builder, "read_masks", "masks: reading"),
        (Mask, "decode", "masks: pixels"),
        (sample_builder, "supervised_patches", "masks: pixels"),
        (builder, "_add_noun", "masks: pixels"),
        (builder, "_add_key_sets", "masks: pixels"),
        (PositionIds, "__call__", "position ids"),
        (collator, "_packed", "joining"),
        (collator, "_visual", "joining"),
        (batch_collation, "find_label_positions", "joining"),
        (batch_collation, "_noun_queries", "joining"),
        (batch_collation, "_mask_targets", "masks: targets"),
        (MaskTargets, "prepare", "masks: targets"),
    ]
