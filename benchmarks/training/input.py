"""Input of the model: padding with and without packing, samples per second of the loader, time of collation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.training.material import SIZES, Clip, write_checkpoint, write_records
from swim_fast.data.batch.collation import Collator
from swim_fast.data.batch.dataset import MixtureSampler, SwimDataset
from swim_fast.data.batch.lengths import sample_lengths
from swim_fast.data.batch.packing import PackingSampler
from swim_fast.data.batch.positions import PositionIds
from swim_fast.data.batch.workers import keep_freed_memory
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.options import Sampling, Source

MIXTURE = tuple(Clip(frames, *size) for frames in (4, 8, 16, 24, 32, 48) for size in ((224, 280), (336, 448)))
ANSWERS = tuple(range(1, 41))  # sentences: one record of every clip for each
PACK_TOKENS, BATCH, RANKS = 8192, 4, 2
LOADED = {  # VideoRefer's clips come from Panda-70M (arXiv 2402.19479): 8.5 s on average, 720p
    "720p, 10 s": (Clip(240, 720, 1280, 24), Clip(240, 720, 1280, 16)),
    "360p to 720p, 3 to 6 s": (Clip(96, 360, 640, 8), Clip(144, 480, 854, 8), Clip(72, 720, 1280, 8)),
}
LOADED_RECORDS = 12  # of each group
WORKERS = 2
LONG = Clip(64, 784, 560, 4)  # 32 patches of 28 × 20 tokens: 17,920


@dataclasses.dataclass(frozen=True)
class Padding:
    """Token slots in batches for each useful token."""

    samples: int
    shortest: int
    longest: int
    padded: float  # batches of BATCH samples, padded to the longest
    packed: float  # packed batches: what they hold
    room: float  # the same: what they may hold, over all ranks, so that it counts what they leave empty
    padded_batches: int
    packed_batches: int


def processor_of(checkpoint: Path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in the block, as in a loader's worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_padding(folder: Path, clips: Sequence[Clip] = MIXTURE, pack_tokens: int = PACK_TOKENS) -> Padding:
    """Padding of one epoch of a mixture of clips and texts; lengths of batches are checked against collated ones."""
    from transformers import AutoConfig

    checkpoint = write_checkpoint(folder / "tiny", SIZES["tiny"])
    records = write_records(folder / "mixture.jsonl", clips, ANSWERS, text_every=5)
    processor = processor_of(checkpoint)
    options = Sampling(max_frames=48, max_tokens=pack_tokens)
    dataset = SwimDataset([Source(path=str(records))], SampleBuilder(processor, options))
    lengths = sample_lengths(dataset, workers=0)
    assert lengths.min() > 0, "a record has a problem"
    order = MixtureSampler(dataset, seed=0)
    items = order.items(0).numpy()
    groups = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    packs = list(PackingSampler(order, lengths, pack_tokens))
    share = PackingSampler(order, lengths, pack_tokens, rank=0, world_size=RANKS)
    assert sorted(sum(packs, [])) == sorted(items.tolist()), "packing lost or repeated a sample"

    def slots(collator: Collator, batch: Sequence[int]) -> int:
        return collator([dataset[int(item)] for item in batch])["input_ids"].numel()

    padded = [len(group) * int(lengths[group].max()) for group in groups]
    packed = [int(lengths[pack].sum()) for pack in packs]
    positions = PositionIds(AutoConfig.from_pretrained(checkpoint))
    assert slots(Collator(processor), groups[0]) == padded[0], "a padded batch has another length than predicted"
    assert slots(Collator(processor, positions, pack=True), packs[0]) == packed[0], "a packed batch has another length"
    useful = int(lengths[items].sum())
    room = len(share) * RANKS * pack_tokens
    dataset.builder.reader.close()
    return Padding(
        samples=len(items),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        padded=sum(padded) / useful,
        packed=sum(packed) / useful,
        room=room / useful,
        padded_batches=len(padded),
        packed_batches=len(packs),
    )


class _Frames(Dataset):
    """The frames of the items of a dataset, decoded as its builder decodes them, and nothing done to them."""

    def __init__(self, dataset: SwimDataset, numbers: Sequence[Sequence[int]]):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        keep_freed_memory()  # as the dataset itself
        source, number = self.dataset.locate(index)
        reader = self.dataset.builder.reader
        return len(reader.frames(self.dataset.files[source][number], self.numbers[index]))


class _Common(Dataset):
    """The common path to the inputs of Qwen2.5-VL: qwen-vl-utils decodes as many frames, the processor does the rest.

    Without labels, nouns and masks. The frames are uniformly spaced, as it knows no others; their size is ours.
    """

    def __init__(self, dataset: SwimDataset, numbers: Sequence[Sequence[int]], processor):
        self.dataset, self.numbers, self.processor = dataset, numbers, processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"  # else torchcodec wherever it is installed
        from qwen_vl_utils import process_vision_info

        source, number = self.dataset.locate(index)
        record = self.dataset.files[source][number]
        limits = self.processor.video_processor.size
        video = {
            "type": "video",
            "video": str(record.media),
            "nframes": len(self.numbers[index]),
            "min_pixels": limits["shortest_edge"],
            "max_pixels": limits["longest_edge"],
        }
        turns = [{"role": "user", "content": [video, {"type": "text", "text": record.turns[0].text}]}]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": record.turns[1].text}]})
        text = self.processor.apply_chat_template(turns, tokenize=False)
        _, videos, about = process_vision_info([turns], return_video_kwargs=True, return_video_metadata=True)
        videos, metadata = [[part[k] for part in videos] for k in (0, 1)]
        about |= {"cap_pixels_per_frame": False}  # as here
        return dict(self.processor(text=[text], videos=videos, video_metadata=metadata, return_tensors="pt", **about))


def _first(items: Sequence[dict]) -> dict:
    (item,) = items
    return item


@dataclasses.dataclass(frozen=True)
class Loading:
    """Seconds of passes over the same samples: by the loader with everything, by one that only decodes, and by one
    that goes the common path."""

    name: str
    samples: int
    frames: int  # of all samples
    everything: list[float]
    decoding: list[float]
    common: list[float]
    load: float  # average number of processes that wanted to run in the minute before

    def share(self) -> float:
        """Return the share of the speed of decoding alone."""
        return statistics.median(self.decoding) / statistics.median(self.everything)


def measure_loading(
    folder: Path, name: str, clips: Sequence[Clip], records: int = LOADED_RECORDS, rounds: int = 3
) -> Loading:
    """Passes of a loader with two workers, alternated with those of one that decodes the same frames, and of the
    common path.

    Workers and decoders have started and have seen each clip before the first pass that counts.
    """
    load = os.getloadavg()[0]
    checkpoint = write_checkpoint(folder / "tiny", SIZES["tiny"])
    each = max(1, records // len(clips))
    path = write_records(folder / f"{name}.jsonl", clips, answers=[1] * each)
    processor = processor_of(checkpoint)
    dataset = SwimDataset([Source(path=str(path))], SampleBuilder(processor, Sampling(max_frames=32)))
    samples = [dataset[index] for index in range(0, len(dataset), each)]  # all records of a clip are alike
    numbers = [samples[index // each].frames for index in range(len(dataset))]
    dataset.builder.reader.close()
    kept = {"num_workers": WORKERS, "persistent_workers": True, "batch_size": 1}
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()  # the same for both
    loaders = {
        "everything": DataLoader(dataset, collate_fn=Collator(processor, frames=True), sampler=order, **kept),
        "decoding": DataLoader(_Frames(dataset, numbers), collate_fn=list, sampler=order, **kept),
        "common": DataLoader(_Common(dataset, numbers, processor), collate_fn=_first, sampler=order, **kept),
    }
    seconds: dict[str, list[float]] = {what: [] for what in loaders}
    for number in range(rounds + 1):
        for what in sorted(loaders, reverse=number % 2 == 1):
            found, passed = _pass(loaders[what])
            if what == "everything":
                assert all(not batch["problems"] and len(batch["mask_targets"]) for batch in found)
            elif what == "decoding":
                assert [count for (count,) in found] == [len(numbers[index]) for index in order]
            else:
                grids = [samples[index // each].inputs["video_grid_thw"] for index in order]
                assert all(torch.equal(batch["video_grid_thw"], grid) for batch, grid in zip(found, grids, strict=True))
            if number:
                seconds[what].append(passed)
    frames = sum(map(len, numbers))
    return Loading(name, len(dataset), frames, **seconds, load=load)


def _pass(loader: DataLoader) -> tuple[list, float]:
    since = time.perf_counter()
    batches = [_without_pixels(batch) for batch in loader]
    return batches, time.perf_counter() - since


def _without_pixels(batch):
    """As soon as it is used: batches that pile up would be the machine's memory, not the loader's speed."""
    return {k: v for k, v in batch.items() if k != "pixel_values_videos"} if isinstance(batch, dict) else batch


@dataclasses.dataclass(frozen=True)
class Collation:
    """Seconds of collating one long sample, five of every round, and of making it, one of every round."""

    tokens: int
    pairs: int
    processor: list[float]  # the processor alone: tokens and pixels
    building: list[float]  # frames, processor, nouns, masks
    padded: list[float]
    packed: list[float]


def measure_collation(folder: Path, clip: Clip = LONG, rounds: int = 5) -> Collation:
    """The sample is made anew by every round of `building`. All is done by one thread, as in a worker."""
    from transformers import AutoConfig

    checkpoint = write_checkpoint(folder / "tiny", SIZES["tiny"])
    path = write_records(folder / "long.jsonl", [clip])
    processor = processor_of(checkpoint)
    options = Sampling(max_frames=clip.frames, max_pixels=clip.height * clip.width)
    builder = SampleBuilder(processor, options)
    dataset = SwimDataset([Source(path=str(path))], builder)
    record = dataset.files[0][0]
    sample = dataset[0]
    plan = builder.plan(record)
    pixels = builder.reader.frames(record, plan.frames)
    positions = PositionIds(AutoConfig.from_pretrained(checkpoint))
    collators = {
        "padded": Collator(processor, frames=True),
        "packed": Collator(processor, positions, pack=True, frames=True),
    }
    for collator in collators.values():
        batch = collator([sample])
        assert batch["pixel_values_videos"] is sample.inputs["pixel_values_videos"]
        assert batch["input_ids"].shape == (1, len(sample.inputs["input_ids"]))
        assert len(batch["mask_targets"]) == len(sample.pairs) > 0
    with one_thread():
        times = {name: _times(lambda c=collator: c([sample]), 5 * rounds) for name, collator in collators.items()}
        encoding = _times(lambda: builder.encode.video(plan.conversation, pixels, plan.frames, plan.info), rounds)
        building = _times(lambda: builder(record), rounds)
    builder.reader.close()
    return Collation(len(sample.inputs["input_ids"]), len(sample.pairs), encoding, building, **times)


def _times(function: Callable[[], object], rounds: int) -> list[float]:
    function()
    times = []
    for _ in range(rounds):
        since = time.perf_counter()
        function()
        times.append(time.perf_counter() - since)
    return times
