"""Maps of a few held-out samples as pictures beside a run's curves, at every evaluation."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.sample.conversation import PLACEHOLDER
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record
from swim_fast.data.source.tags import strip_tags
from swim_fast.errors import UserError
from swim_fast.loss.mask_loss import MaskTargets
from swim_fast.options import AttentionLoss
from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid
from swim_kernels import grid_prediction

logger = logging.getLogger(__name__)

TRACKERS = {"tensorboard": TensorBoardCallback, "wandb": WandbCallback}  # by their names in `report_to`
MAX_PATCHES = 6  # of a picture
TRIED = 20  # records for each sample, until one has a mask


@dataclasses.dataclass
class _Place:
    """A stretch of an evaluation set, of which one sample is shown; `index` is None while none is found."""

    name: str
    data: SwimDataset
    indices: range
    index: int | None = None


class LiveMaps(TrainerCallback):
    """Draws the maps of a few tagged samples, the same at every evaluation, into TensorBoard and W&B.

    Every rank makes each sample and one forward of it, as a forward may be collective; the first rank draws. A sample
    that a rank cannot make is an empty batch there.

    Args:
        count: samples to show, taken evenly from the sets that have tags.
        sets: evaluation sets by name.
        loss: fusion of the maps.
        compute_maps: returns the maps of a batch of samples, of the model as evaluation sees it, and its targets.
        callbacks: returns those of the trainer, among which are the trackers'.
    """

    def __init__(
        self,
        count: int,
        sets: dict[str, SwimDataset],
        loss: AttentionLoss,
        compute_maps: Callable[[list[Sample]], tuple[Sequence[Tensor], MaskTargets]],
        callbacks: Callable[[], Iterable[TrainerCallback]],
    ):
        self._places = spread(count, sets)
        self._loss, self._compute_maps, self._callbacks = loss, compute_maps, callbacks
        self._step: int | None = None  # of the latest pictures

    def on_evaluate(self, args, state, control, **kwargs):
        if not TRACKERS.keys() & set(args.report_to) or state.global_step == self._step:
            return  # the same on all ranks
        self._step = state.global_step
        for place in self._places:
            sample = self._make(place)
            maps, targets = self._compute_maps([] if sample is None else [sample])
            if sample is None or not state.is_world_process_zero:
                continue
            if not len(targets):
                logger.warning("no picture of %s: the ranks that share it have read it differently", sample.name)
                continue
            p = grid_prediction(
                maps, targets.pairs, fusion=self._loss.shown_fusion, prediction="min_max", backend=self._loss.backend
            )
            try:
                self._show(place, sample, p[0].float().cpu().numpy())
            except (UserError, OSError) as error:
                logger.warning("no picture of %s: %s", sample.name, error)
        if args.dataloader_num_workers:  # this process needs no decoder for anything else
            for place in self._places:
                place.data.builder.reader.close()

    def _make(self, place: _Place) -> Sample | None:
        """Return the sample of a place; one is found at the first evaluation."""
        for index in place.indices[:TRIED] if place.index is None else [place.index]:
            if not _has_masks(place.data, index):
                continue
            sample = place.data[index]
            if isinstance(sample, Sample) and sample.pairs:
                place.index = index
                return sample
        return None

    def _show(self, place: _Place, sample: Sample, cells: np.ndarray) -> None:
        builder, record = place.data.builders[0], place.data.files[0][place.index]
        title, columns = view_sample(sample, record, builder, cells)
        canvas = heatmap_grid(columns, title=f"step {self._step}: {title}").canvas
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        name = f"maps/{place.name}/{place.index}"
        for callback in self._callbacks():
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(name, picture, self._step, dataformats="HWC")
            elif isinstance(callback, WandbCallback) and callback._wandb is not None:
                image = callback._wandb.Image(picture, caption=title)
                callback._wandb.log({name: image, "train/global_step": self._step})


def spread(count: int, sets: dict[str, SwimDataset]) -> list[_Place]:
    """Divide the sets that have tags into stretches of as many records, at most `count`, none across two sets."""
    records = [(name, data) for name, data in sets.items() if any(source.use_tags for source in data.sources)]
    total = sum(len(data) for _, data in records)
    count = min(count, total)
    starts = [number * total // count for number in range(count)]
    places, first = [], 0
    for name, data in records:
        own = [start - first for start in starts if first <= start < first + len(data)]
        places += [_Place(name, data, range(*ends)) for ends in zip(own, [*own[1:], len(data)], strict=True)]
        first += len(data)
    return places


def view_sample(
    sample: Sample, record: Record, builder: SampleBuilder, cells: np.ndarray
) -> tuple[str, list[HeatmapColumn]]:
    """Return the title and the columns of a sample's picture: the patches in which its first noun has a mask.

    Args:
        sample: with pairs.
        record: of which it was made.
        builder: of its source.
        cells: fp32 [M], predictions of all its pairs, one after the other.

    Raises:
        DataError: frames that cannot be decoded.
    """
    tag = sample.tags[sample.pairs[0].row]
    masks: dict[int, int] = {}
    maps: dict[int, list[np.ndarray]] = {}  # of each token of the noun, by patch
    first = 0
    for pair in sample.pairs:
        end = first + pair.height * pair.width
        if sample.tags[pair.row] == tag:
            patch = sample.patch(pair)
            masks[patch] = pair.mask
            maps.setdefault(patch, []).append(cells[first:end].reshape(pair.height, pair.width))
        first = end
    size = builder.encode.frames_per_patch(record.kind)
    patches = sorted(maps)
    patches = [patches[i] for i in np.linspace(0, len(patches) - 1, min(MAX_PATCHES, len(patches))).round().astype(int)]
    frames = []
    for patch in patches:
        inside = sample.frames[patch * size : (patch + 1) * size]
        frames.append(next((frame for frame in inside if record.objects[tag].get(frame)), inside[0]))
    pixels = builder.encode.seen(record.kind, builder.reader.frames(record, frames))
    columns = [
        HeatmapColumn(frame, sample.masks[masks[patch]].numpy(), [np.mean(maps[patch], axis=0)], f"frame {number}")
        for frame, patch, number in zip(pixels, patches, frames, strict=True)
    ]
    return _title(record, tag), columns


def _title(record: Record, tag: int) -> str:
    """Return a noun and the turn that it is tagged in."""
    for turn in record.turns:
        text, nouns = strip_tags(turn.text)
        if tag < len(nouns):
            start, end = nouns[tag]
            return f"“{text[start:end]}” in “{' '.join(PLACEHOLDER.sub(' ', text).split())}”"
        tag -= len(nouns)
    raise IndexError("the record has fewer tags")


def _has_masks(data: SwimDataset, index: int) -> bool:
    """Tell whether a record names frames with masks; nothing is decoded for it."""
    try:
        source, number = data.locate(index)
        return any(data.files[source][number].objects)
    except DataError:  # told in the evaluation
        return False
