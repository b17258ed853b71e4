"""Does a trained checkpoint answer right? Plain text and pixels in, greedy text out, no tags, no maps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from swim_fast.data.collation import Collator
from swim_fast.data.encoding import IGNORED_LABEL
from swim_fast.data.records import Record
from swim_fast.data.samples import Sample, SampleBuilder, SampleOptions


def prompt_and_answer(sample: Sample) -> tuple[Sample, Tensor]:
    """Cut a sample before its first answer: what the model is given at inference, and the label tokens expected."""
    labels = sample.inputs["labels"]
    first = int((labels != IGNORED_LABEL).nonzero()[0])
    per_token = ("input_ids", "labels", "mm_token_type_ids")
    inputs = {key: value[:first] if key in per_token else value for key, value in sample.inputs.items()}
    return Sample(sample.name, inputs), labels[labels != IGNORED_LABEL]


@torch.no_grad()
def answer_accuracy(model, processor, records: Sequence[Record], options: SampleOptions, batch_size: int = 16) -> float:
    """Share of records whose greedy answer is the reference, word for word.

    Args:
        model, processor: a checkpoint as loaded by stock transformers.
        records: with one question and one answer each.
    """
    builder, collate = SampleBuilder(processor, options), Collator(processor)
    right = 0
    for begin in tqdm(range(0, len(records), batch_size), desc="answering", leave=False):
        samples = [builder(records[i]) for i in range(begin, min(begin + batch_size, len(records)))]
        prompts, answers = zip(*map(prompt_and_answer, samples), strict=True)
        batch = collate(prompts)
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        visual = {k: v for k, v in batch.items() if k in samples[0].inputs and k not in (*names, "labels")}
        inputs = {name: left_padded(batch[name], batch["attention_mask"]) for name in names}
        longest = max(map(len, answers))
        found = model.generate(**inputs, **visual, max_new_tokens=longest, do_sample=False)
        for tokens, answer in zip(found[:, batch["input_ids"].shape[1] :], answers, strict=True):
            said, expected = processor.batch_decode([tokens, answer], skip_special_tokens=True)
            right += said.strip() == expected.strip()
    return right / len(records)


def left_padded(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Move the padding of `values` `[B, L]` from the right to the left, for generation."""
    length = values.shape[1]
    shift = length - attention_mask.sum(1, keepdim=True)
    return values.gather(1, (torch.arange(length, device=values.device) - shift) % length)
