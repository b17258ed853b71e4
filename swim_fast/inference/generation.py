"""Generate answers and score texts: plain text and pixels in, no tags, no maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import Sample
from swim_fast.labels import IGNORED_LABEL

# The settings of sampling that a checkpoint brings along would only give warnings.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
_PER_TOKEN = ("input_ids", "labels", "mm_token_type_ids")


def split_answer(sample: Sample) -> tuple[Sample, Tensor]:
    """Cut a sample before its first answer: the prompt as the model has it at inference, and the tokens expected."""
    labels = sample.inputs["labels"]
    first = int((labels != IGNORED_LABEL).nonzero()[0])
    inputs = {key: value[:first] if key in _PER_TOKEN else value for key, value in sample.inputs.items()}
    return Sample(sample.name, inputs, frames=sample.frames, notes=sample.notes), labels[labels != IGNORED_LABEL]


@torch.no_grad()
def generate(model, processor, prompts: Sequence[Sample], max_new_tokens: int, stream: bool = False) -> list[str]:
    """Return the model's greedy answers to a batch of prompts, without special tokens.

    Args:
        model, processor: a checkpoint as loaded by stock transformers; of its generation settings those that do not
            sample, such as a repetition penalty, stay in force.
        prompts: B samples without answers, as `split_answer` leaves them.
        max_new_tokens: most tokens of an answer.
        stream: print the answer to a single prompt while it is generated.
    """
    from transformers import TextStreamer

    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    inputs = _left_padded_inputs(model, processor, prompts)
    found = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **GREEDY)
    return processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class TextScore:
    """Log-likelihoods of one text as the answer.

    Attributes:
        letter: sum over its tokens up to the first ")".
        total: sum over all its tokens.
        mean: total divided by the number of tokens.
    """

    letter: float
    total: float
    mean: float


@torch.no_grad()
def score_texts(model, processor, prompt: Sample, texts: Sequence[str], batch_size: int) -> list[TextScore]:
    """Return how likely the model finds each text as its answer to a prompt; the end of the turn does not count.

    Args:
        model, processor: as for `generate`.
        prompt: one sample without answer.
        texts: answers such as "(A) A helmet"; none empty.
        batch_size: texts at a time, each of which comes with the whole prompt.
    """
    scores = []
    for begin in range(0, len(texts), batch_size):
        part = texts[begin : begin + batch_size]
        tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in part]
        inputs = _left_padded_inputs(model, processor, [_continue(prompt, ids) for ids in tokens])
        longest = max(map(len, tokens))
        # Only the last tokens' logits: those of a whole video would take gigabytes.
        logits = model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits  # [B, longest + 1, vocabulary]
        for row, ids in zip(logits, tokens, strict=True):
            chosen = row[longest - len(ids) : longest].float().log_softmax(-1)  # [len(ids), vocabulary]
            values = chosen.gather(1, torch.tensor(ids, device=chosen.device)[:, None])[:, 0].double().tolist()
            letter = next((k for k in range(1, len(ids)) if ")" in processor.tokenizer.decode(ids[:k])), len(ids))
            scores.append(TextScore(sum(values[:letter]), sum(values), sum(values) / len(values)))
    return scores


def _continue(prompt: Sample, tokens: Sequence[int]) -> Sample:
    added = torch.tensor(tokens)
    ends = {"input_ids": added, "labels": added, "mm_token_type_ids": torch.zeros_like(added)}
    inputs = {key: torch.cat([value, ends[key]]) if key in ends else value for key, value in prompt.inputs.items()}
    return Sample(prompt.name, inputs)


def _left_padded_inputs(model, processor, prompts: Sequence[Sample]) -> dict[str, Any]:
    """Return the arguments of the model's forward, with the padding moved to the left, where generation wants it."""
    batch = Collator(processor, frames=True)(prompts)
    mask = batch["attention_mask"]  # [B, L]
    length = mask.shape[1]
    source = (torch.arange(length) - (length - mask.sum(1, keepdim=True))) % length
    for name in {"input_ids", "mm_token_type_ids", "token_type_ids", "attention_mask"} & batch.keys():
        batch[name] = batch[name].gather(1, source)
    return model_inputs(batch, model.device, model.dtype)
