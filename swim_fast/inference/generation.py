"""What a model says and how likely it finds a text: plain text and pixels in, no tags, no maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import Sample
from swim_fast.data.sample.encoding import IGNORED_LABEL

_PER_TOKEN = ("input_ids", "labels", "mm_token_type_ids")


def load_model(path: str, dtype: str = "auto", attention: str = "sdpa", device: str = "cpu") -> tuple[Any, Any]:
    """A checkpoint as stock transformers load it, ready for inference.

    Args:
        path: folder or name on the Hugging Face hub.
        dtype: "auto" (the checkpoint's own) or the name of a torch dtype.
        attention: implementation, as `attn_implementation` of transformers.
        device: where the weights go.

    Returns:
        `(model, processor)`.

    Raises:
        ValueError: no such checkpoint, or an unknown dtype.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype} is no dtype of torch; give auto, float32, bfloat16 or float16")
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), attn_implementation=attention
        )
        processor = AutoProcessor.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"the model {path!r} is neither a checkpoint folder nor to be had: {error}") from error
    return model.to(device).eval(), processor


def prompt_and_answer(sample: Sample) -> tuple[Sample, Tensor]:
    """Cut a sample before its first answer: what the model is given at inference, and the label tokens expected."""
    labels = sample.inputs["labels"]
    first = int((labels != IGNORED_LABEL).nonzero()[0])
    inputs = {key: value[:first] if key in _PER_TOKEN else value for key, value in sample.inputs.items()}
    return Sample(sample.name, inputs, frames=sample.frames, notes=sample.notes), labels[labels != IGNORED_LABEL]


def left_padded(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Move the padding of `values` `[B, L]` from the right to the left, for generation."""
    length = values.shape[1]
    shift = length - attention_mask.sum(1, keepdim=True)
    return values.gather(1, (torch.arange(length, device=values.device) - shift) % length)


@torch.no_grad()
def generate(model, processor, prompts: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """The model's greedy answers to a batch of prompts, without special tokens.

    Args:
        model, processor: a checkpoint as loaded by stock transformers; of its generation settings those that do not
            sample, such as a repetition penalty, stay in force.
        prompts: B samples, cut by `prompt_and_answer`.
        max_new_tokens: most tokens of an answer.
    """
    inputs = _left_padded_inputs(model, processor, prompts)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    found = model.generate(**inputs, max_new_tokens=max_new_tokens, **greedy)
    return processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class TextScore:
    """Log-likelihoods of one text as the answer.

    Attributes:
        letter: of its tokens up to the first ")".
        total: of all its tokens.
        mean: total by the number of tokens.
    """

    letter: float
    total: float
    mean: float


@torch.no_grad()
def text_scores(model, processor, prompt: Sample, texts: Sequence[str], batch_size: int) -> list[TextScore]:
    """How likely the model finds each text as its answer to a prompt; the end of the turn does not count.

    Args:
        model, processor: as for `generate`.
        prompt: one sample, cut by `prompt_and_answer`.
        texts: such as "(A) A helmet"; none empty.
        batch_size: texts at a time, each of which comes with the whole prompt.
    """
    scores = []
    for begin in range(0, len(texts), batch_size):
        part = texts[begin : begin + batch_size]
        tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in part]
        inputs = _left_padded_inputs(model, processor, [_continued(prompt, ids) for ids in tokens])
        longest = max(map(len, tokens))
        # Only the last places' logits: of all tokens of a video they would take gigabytes.
        logits = model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits  # [B, longest + 1, vocabulary]
        for row, ids in zip(logits, tokens, strict=True):
            chosen = row[longest - len(ids) : longest].float().log_softmax(-1)  # [len(ids), vocabulary]
            values = chosen.gather(1, torch.tensor(ids, device=chosen.device)[:, None])[:, 0].double().tolist()
            letter = next((k for k in range(1, len(ids)) if ")" in processor.tokenizer.decode(ids[:k])), len(ids))
            scores.append(TextScore(sum(values[:letter]), sum(values), sum(values) / len(values)))
    return scores


def _continued(prompt: Sample, tokens: Sequence[int]) -> Sample:
    added = torch.tensor(tokens)
    ends = {"input_ids": added, "labels": added, "mm_token_type_ids": torch.zeros_like(added)}
    inputs = {key: torch.cat([value, ends[key]]) if key in ends else value for key, value in prompt.inputs.items()}
    return Sample(prompt.name, inputs)


def _left_padded_inputs(model, processor, prompts: Sequence[Sample]) -> dict[str, Any]:
    batch = Collator(processor)(prompts)
    for name in ("input_ids", "mm_token_type_ids"):
        batch[name] = left_padded(batch[name], batch["attention_mask"])
    batch["attention_mask"] = left_padded(batch["attention_mask"], batch["attention_mask"])
    return model_inputs(batch, model.device)
