"""Answers of a trained checkpoint against the reference: plain text and pixels in, greedy text out."""

from collections.abc import Sequence

from tqdm import tqdm

from swim_fast.config import RunConfig
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.records import Record
from swim_fast.inference.generation import generate, split_answer
from swim_fast.inference.loading import Checkpoint
from swim_fast.options import Decoding, Inference, Sampling


def choose_inference(config: RunConfig) -> Inference:
    """Return how a trained checkpoint is loaded: on the CPU if it was trained there on purpose."""
    device = "cpu" if config.training.get("use_cpu") else None
    return Inference(device=device, position_ids=config.model.position_ids)


def compute_accuracy(
    checkpoint: Checkpoint, records: Sequence[Record], sampling: Sampling, decoding: Decoding, batch_size: int = 16
) -> float:
    """Return the share of records whose greedy answer is the reference, word for word.

    Args:
        checkpoint: a stock model and its processor.
        records: one question and one answer each.
        sampling, decoding: how frames are taken.
        batch_size: records at a time.
    """
    model, processor = checkpoint
    builder = SampleBuilder(processor, sampling, decoding)
    right = 0
    for begin in tqdm(range(0, len(records), batch_size), desc="answering", leave=False):
        samples = [builder(records[i]) for i in range(begin, min(begin + batch_size, len(records)))]
        prompts, answers = zip(*map(split_answer, samples), strict=True)
        found = generate(model, processor, prompts, max_new_tokens=max(map(len, answers)))
        expected = processor.batch_decode(answers, skip_special_tokens=True)
        right += sum(said.strip() == text.strip() for said, text in zip(found, expected, strict=True))
    return right / len(records)
