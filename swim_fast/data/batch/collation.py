"""Samples to one batch: padded or packed tokens, concatenated pixels, one set of noun queries and mask targets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from swim_fast.data.batch.counts import BatchCounts
from swim_fast.data.batch.positions import PositionIds
from swim_fast.data.sample.builder import Sample
from swim_fast.data.source.errors import DataError
from swim_fast.families import get_layout_class
from swim_fast.families.patches import PackedFrames
from swim_fast.labels import IGNORED_LABEL, find_label_positions
from swim_fast.loss.questions import Questions
from swim_fast.loss.targets import MaskTargets
from swim_kernels import NounQueries, PackedMasks

# What a batch holds beside the arguments of the model's forward.
ABOUT = (
    "labels",
    "label_positions",
    "noun_queries",
    "mask_targets",
    "questions",
    "counts",
    "samples",
    "problems",
    "notes",
)


def model_inputs(
    batch: dict[str, Any], device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return the part of a batch that a stock model's forward takes.

    Args:
        batch: of `Collator`.
        device: where the tensors go; None: they stay.
        dtype: of the patches that are made of `PackedFrames`, there: the model's.
    """
    inputs = {key: value for key, value in batch.items() if key not in ABOUT}
    if device is not None:
        moved = Tensor | PackedFrames
        inputs = {key: value.to(device) if isinstance(value, moved) else value for key, value in inputs.items()}
    return {key: value.patches(dtype) if isinstance(value, PackedFrames) else value for key, value in inputs.items()}


class Collator:
    """Makes a batch of any number of samples; picklable, so that worker processes can use it.

    Args:
        processor: the model's processor, whose tokenizer names the token to pad with.
        positions: of the samples, computed here rather than in the model, which would wait for the device many times;
            None leaves them to the model.
        pack: put the samples of a batch one behind the other into one sequence without padding, in which the positions,
            which are needed, say where each begins; else they are padded.
        frames: leave images and videos as `PackedFrames`, of which `model_inputs` makes patches on the model's device;
            else they are the patches that the model takes, fp32.
    """

    def __init__(self, processor: Any, positions: PositionIds | None = None, pack: bool = False, frames: bool = False):
        if pack and positions is None:
            raise ValueError("packed samples need position ids: Collator(processor, PositionIds(…), pack=True)")
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._padding = {"input_ids": pad, "labels": IGNORED_LABEL, "mm_token_type_ids": 0}
        self._end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else pad
        self._positions, self._pack, self._frames = positions, pack, frames
        self._layout = get_layout_class(processor)

    def __call__(self, items: Sequence[Sample | DataError]) -> dict[str, Any]:
        """Collate samples; errors among them are listed and left out.

        With no sample left, or none given, the batch is one token of text that is not trained on, without queries or
        targets: a rank whose clips are all broken still takes part in the step.

        Args:
            items: B samples and any number of errors.

        Returns:
            Arguments of the model's forward: `input_ids`, `mm_token_type_ids`, `labels` [B, L] int64, padded on the
            right, with `attention_mask` [B, L] and, if they are computed here, `position_ids` [3, B, L] int64 (time,
            height, width); or, of packed samples of T tokens in all,

            - the same three as [1, T], without a mask; no label of a sample's first token, which nothing predicts;
            - `position_ids` [4, 1, T] int64: the position in the sample, by which transformers tells packed sequences
              apart, and the model's own three (time, height, width);
            - `cu_seq_lens_q`, `cu_seq_lens_k` int32 [B + 1] and `max_length_q`, `max_length_k`, numbers, for flash
              attention of the language model, see `swim_fast.modeling.packed`.

            The visual tensors that occur in the batch, joined (times between temporal patches as `Seconds`); and
            beside it

            - `label_positions` [n] int64, see `find_label_positions`, and `counts`: `BatchCounts`;
            - `questions`: `Questions`, of samples with rows of questions;
            - `noun_queries`: `NounQueries`, `mask_targets`: `MaskTargets`, their rows in the order of the samples;
            - `samples`: names of the samples, `problems`: text of each error, `notes`: `name: note` of each note; lists
              of strings.
        """
        samples = [item for item in items if isinstance(item, Sample)]
        inputs = [sample.inputs for sample in samples] or [self._placeholder()]
        if self._pack:
            tokens = self._packed(inputs)
            starts = [(0, start) for start in tokens["cu_seq_lens_q"].tolist()[: len(samples)]]
        else:
            tokens, starts = self._padded(inputs), [(sequence, 0) for sequence in range(len(samples))]
        batch = {**tokens, **self._visual(inputs)}
        types = batch.pop("mm_token_type_ids")
        if self._layout.token_types is not None:
            batch[self._layout.token_types] = types
        queries = _noun_queries(samples, starts)
        queries.key_columns(tokens["input_ids"].shape[1])  # remembered, for the kernels
        return {
            **batch,
            "label_positions": find_label_positions(batch["labels"]),
            "counts": BatchCounts.from_batch(batch, samples),
            "noun_queries": queries,
            "questions": _questions(samples, starts),
            "mask_targets": _mask_targets(samples),
            "samples": [sample.name for sample in samples],
            "problems": [str(item) for item in items if isinstance(item, DataError)],
            "notes": [f"{sample.name}: {note}" for sample in samples for note in sample.notes],
        }

    def _placeholder(self) -> dict[str, Tensor]:
        values = {"input_ids": self._end, "labels": IGNORED_LABEL, "mm_token_type_ids": 0}
        return {key: torch.tensor([value]) for key, value in values.items()}

    def _padded(self, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {
            key: pad_sequence([sample[key] for sample in inputs], batch_first=True, padding_value=value)
            for key, value in self._padding.items()
        }
        lengths = torch.tensor([len(sample["input_ids"]) for sample in inputs])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        if self._positions is not None and self._positions.axes > 1:  # a single axis is counted by the model itself
            positions = [self._positions(sample)[1:].T for sample in inputs]
            batch["position_ids"] = pad_sequence(positions, batch_first=True).permute(2, 0, 1).contiguous()
        return batch

    def _packed(self, inputs: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch = {key: torch.cat([sample[key] for sample in inputs])[None] for key in self._padding}
        lengths = [len(sample["input_ids"]) for sample in inputs]
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        batch["labels"][0, ends[:-1].long()] = IGNORED_LABEL
        positions = torch.cat([self._positions(sample) for sample in inputs], dim=1)
        batch["position_ids"] = positions[:, None] if self._positions.axes > 1 else positions
        varlen = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        return batch | varlen | dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))

    def _visual(self, inputs: list[dict[str, Tensor]]) -> dict[str, Any]:
        keys = dict.fromkeys(key for sample in inputs for key in sample if key not in self._padding)
        batch: dict[str, Any] = {}
        for key in keys:
            values = [sample[key] for sample in inputs if key in sample]
            frames = isinstance(values[0], PackedFrames)
            batch[key] = PackedFrames.join(values) if frames else self._layout.join(key, values)
        if not self._frames:
            batch = model_inputs(batch)
        return batch


def _noun_queries(samples: Sequence[Sample], starts: Sequence[tuple[int, int]]) -> NounQueries:
    """Join the rows of all samples, each of which starts at a token of a sequence of the batch."""
    rows, key_sets = [], []
    for sample, (sequence, first) in zip(samples, starts, strict=True):
        for row in sample.rows:
            tokens = (first + token for token in (row.position, row.key_start, row.key_end))
            rows.append((sequence, *tokens, len(key_sets) + row.key_set))
        key_sets += [torch.where(keys < 0, keys, first + keys) for keys in sample.key_sets]
    sequence, position, key_start, key_end, key_set = _columns(rows, 5)
    padded = pad_sequence(key_sets, batch_first=True, padding_value=-1) if key_sets else torch.empty(0, 0).long()
    over = {sample.over for sample in samples if sample.rows}
    if len(over) > 1:
        raise ValueError("samples of a batch must have one kind of softmax, over ranges or over key sets")
    return NounQueries(
        sequence=sequence,
        position=position,
        key_start=key_start,
        key_end=key_end,
        key_set=key_set,
        key_sets=padded,
        over=over.pop() if over else "range",
    )


def _questions(samples: Sequence[Sample], starts: Sequence[tuple[int, int]]) -> Questions:
    """Join the rows of the questions of all samples that have some."""
    rows, sets = [], []
    for sample, (sequence, first) in zip(samples, starts, strict=True):
        if sample.questions:
            rows += [(sequence, first + t, first, first + t + 1, len(sets) // 2) for t in sample.questions]
            visual = torch.nonzero(sample.inputs["mm_token_type_ids"]).flatten()
            sets += [first + visual, first + torch.arange(sample.tokens_before)]
    sequence, position, key_start, key_end, group = _columns(rows, 5)
    padded = pad_sequence(sets, batch_first=True, padding_value=-1) if sets else torch.empty(0, 0).long()
    groups = len(sets) // 2
    return Questions(
        NounQueries(sequence, position, key_start, key_end, group, torch.empty(groups, 0).long()),
        padded.view(groups, 2, padded.shape[1]),
        torch.tensor([len(keys) for keys in sets]).view(groups, 2),
    )


def _mask_targets(samples: Sequence[Sample]) -> MaskTargets:
    pairs, masks, first_row = [], [], 0
    for sample in samples:
        pairs += [p._replace(row=first_row + p.row, mask=len(masks) + p.mask) for p in sample.pairs]
        masks += sample.masks
        first_row += len(sample.rows)
    row, start, height, width, mask = _columns(pairs, 5)
    packed = PackedMasks.pack(masks)
    return MaskTargets(row=row, start=start, height=height, width=width, mask=mask, masks=packed).prepare()


def _columns(table: list[tuple[int, ...]], width: int) -> tuple[Tensor, ...]:
    return torch.tensor(table, dtype=torch.int64).reshape(-1, width).t().contiguous().unbind()
