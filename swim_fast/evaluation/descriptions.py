"""VideoRefer-Bench-D: descriptions of objects, scored by a judge in four dimensions.

A record: the question that asks for the description and the clip, see `swim_fast.evaluation.benchmark`, and the correct
description under ``caption`` or as the first answer of ``conversations``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim_fast.data.source.records import Record, RecordFile, read_turns
from swim_fast.data.source.tags import strip_tags
from swim_fast.evaluation.benchmark import prompt_record, prompt_sample, question_of, read_items, text_under
from swim_fast.evaluation.judge import DIMENSIONS, PROMPT_VERSION, JudgeTask, judge
from swim_fast.evaluation.predictions import Predictions, stored_settings
from swim_fast.evaluation.ranks import Ranks
from swim_fast.evaluation.run import RunOptions, predict_rest
from swim_fast.inference.generation import generate, load_model
from swim_fast.llm.endpoint import EndpointOptions
from swim_fast.llm.settle import Outcome

FRAME_MODES = ("text", "single", "multi")


@dataclass(frozen=True)
class JudgeOptions:
    """The judge, the file of its answers (None: in the folder of the run), and how often it may answer."""

    endpoint: EndpointOptions
    journal: Path | None = None
    attempts: int = 3

    def __post_init__(self):
        if self.attempts < 1:
            raise ValueError(f"--attempts is {self.attempts}; it must be at least 1")


@dataclass(frozen=True)
class Description:
    """One record: its prompt as a record, and the correct description."""

    record: Record
    caption: str


def read_description(records: RecordFile, entry: dict[str, Any], number: int) -> Description:
    """The item of an entry, whose keys are in lower case.

    Raises:
        DataError: for whatever is missing.
    """
    if entry.get("caption") is None and entry.get("conversations") is not None:
        answers = [turn.text for turn in read_turns(entry) if turn.role == "assistant"]
        entry = {**entry, "caption": strip_tags(answers[0])[0] if answers else None}
    caption = text_under(entry, "caption").strip()
    return Description(prompt_record(records, entry, number, question_of(entry)), caption)


def evaluate_descriptions(
    options: RunOptions,
    ranks: Ranks,
    judging: JudgeOptions | None = None,
    *,
    judge_only: bool = False,
    frame_mode: str = "text",
    max_new_tokens: int = 256,
) -> dict[str, Any] | None:
    """Describe the objects of a file, and have the descriptions judged.

    Args:
        options, ranks: how the model is run.
        judging: the judge; None: predictions only.
        judge_only: judge the predictions that are in the folder, without loading a model.
        frame_mode: how the object is pointed out, which is recorded beside the scores: "text", by the question alone;
            "single" or "multi", also drawn into one or all frames of the clips that were handed over.
        max_new_tokens: most tokens of a description.

    Returns:
        What `score_descriptions` makes of it, on the first rank; None on the others.

    Raises:
        DataError: the file cannot be read, or none of its records can be used.
        ValueError: a model that cannot be loaded; predictions of another run in the folder, or none to judge.
        EndpointError: the judge cannot be asked.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    if judge_only and judging is None:
        raise ValueError("--judge-only needs a --judge-model")
    records = RecordFile(options.file, options.media)
    items, problems = read_items(records, options.count(len(records)), read_description)
    settings = options.settings("descriptions", max_new_tokens=max_new_tokens, frame_mode=frame_mode)
    if judge_only:  # whatever the predictions were made with, as long as it is this model on this file
        made = stored_settings(options.out)
        named = ("evaluation", "model", "file", "contents")
        settings = {**made, **{name: settings[name] for name in named}}
    with Predictions(options.out, settings) as predictions:
        if not judge_only and any(number not in predictions.done for number in items):
            model, processor = load_model(options.model, options.dtype, options.attention, ranks.device)
            builder = options.sample_builder(processor)

            def describe(batch):
                said = generate(model, processor, [sample for _, sample in batch], max_new_tokens)
                return [{"description": text.strip()} for text in said]

            predict_rest(
                list(items),
                lambda number: prompt_sample(builder, items[number].record),
                describe,
                predictions,
                options,
                ranks,
                desc="describing",
            )
        if ranks.rank:
            return None
        entries = predictions.entries()
    outcomes = None
    if judging is not None:
        tasks = [
            JudgeTask(number, item.caption, entries[number]["description"])
            for number, item in items.items()
            if "description" in entries.get(number, {})
        ]
        journal = judging.journal or options.out / "judge.journal.jsonl"
        outcomes = judge(tasks, judging.endpoint, journal, judging.attempts)
        settings = {
            **settings,
            "judge": judging.endpoint.model,
            "judge_temperature": judging.endpoint.temperature,
            "judge_prompt": PROMPT_VERSION,
        }
    return {"settings": settings, **score_descriptions(items, entries, problems, outcomes)}


def score_descriptions(
    items: Mapping[int, Description],
    entries: Mapping[int, Mapping[str, Any]],
    problems: Mapping[int, str],
    outcomes: Mapping[int, Outcome[tuple[int, ...]]] | None,
) -> dict[str, Any]:
    """Average the scores.

    Args:
        items: the records by number.
        entries: predictions and problems of clips by record number.
        problems: of records that could not be read.
        outcomes: of the judge, for every description; None where nobody judged.

    Returns:
        ``described``: how many; ``problems``: record number -> why there is no description, which counts nowhere;
        ``scores``: record number -> the four scores; ``failed``: record number -> why there are none though the judge
        was asked, which count nowhere either; ``means``: by dimension over the scores, and ``average``: the mean of the
        means; None without scores.
    """
    problems = dict(problems)
    for number in items:
        entry = entries.get(number, {"problem": "was not described"})
        if "problem" in entry:
            problems[number] = entry["problem"]
    judged = outcomes or {}
    scores = {n: dict(zip(DIMENSIONS, o.result, strict=True)) for n, o in judged.items() if o.result is not None}
    means = {name: sum(row[name] for row in scores.values()) / len(scores) for name in DIMENSIONS} if scores else None
    return {
        "described": sum(number not in problems for number in items),
        "problems": dict(sorted(problems.items())),
        "scores": scores,
        "failed": {n: outcome.reason for n, outcome in judged.items() if outcome.result is None},
        "means": means,
        "average": sum(means.values()) / len(DIMENSIONS) if means else None,
    }
