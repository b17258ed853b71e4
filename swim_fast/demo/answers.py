"""Answers of the demo's models against the reference: plain text and pixels in, greedy text out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from swim_fast.config import RunConfig
from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.records import RecordFile
from swim_fast.inference.generation import generate, split_answer
from swim_fast.inference.loading import load_processor
from swim_fast.options import Inference

BATCH_SIZE = 64


def choose_inference(config: RunConfig) -> Inference:
    """Return how a trained checkpoint is loaded: on the CPU if it was trained there on purpose."""
    device = "cpu" if config.training.get("use_cpu") else None
    return Inference(device=device, position_ids=config.model.position_ids)


@dataclass(frozen=True)
class HeldOutAnswers:
    """Questions about the held-out clips, decoded once, with the tokens of their answers."""

    name: str
    processor: Any
    questions: list[tuple[Sample, Tensor]]

    @classmethod
    def from_config(cls, config: RunConfig) -> HeldOutAnswers:
        """Read the first evaluation file of a run, whose records hold one question and one answer each."""
        (name, source), *_ = config.data.eval.items()
        processor = load_processor(config.model.path)
        builder = SampleBuilder(processor, config.sampling, config.decoding)
        return cls(name, processor, [split_answer(builder(record)) for record in RecordFile.from_source(source)])

    def score(self, model) -> float:
        """Return the share of the questions that a model answers as the reference does, word for word."""
        right = 0
        for begin in range(0, len(self.questions), BATCH_SIZE):
            prompts, answers = zip(*self.questions[begin : begin + BATCH_SIZE], strict=True)
            found = generate(model, self.processor, prompts, max_new_tokens=max(map(len, answers)))
            expected = self.processor.batch_decode(answers, skip_special_tokens=True)
            right += sum(said.strip() == text.strip() for said, text in zip(found, expected, strict=True))
        return right / len(self.questions)


class AnswersOverSteps(TrainerCallback):
    """Scores the answers of the model in training at each evaluation, into the trainer's log."""

    def __init__(self, answers: HeldOutAnswers):
        self.answers = answers
        self.accuracies: dict[int, float] = {}  # by step

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        accuracy = self.answers.score(model)
        self.accuracies[state.global_step] = accuracy
        key = f"eval_{self.answers.name}_answer_accuracy"
        print(f"step {state.global_step}/{state.max_steps}  answers: {accuracy:.0%} right", flush=True)
        state.log_history.append({key: accuracy, "step": state.global_step, "epoch": state.epoch})
