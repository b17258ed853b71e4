"""VideoRefer-Bench-D: descriptions of objects, scored by a judge in four dimensions.

A record: the question that asks for the description and the clip, see `swim_fast.evaluation.prompts`, and the correct
description under `caption` or as the first answer of `conversations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim_fast.data.source.records import Record, RecordFile, read_turns
from swim_fast.data.source.tags import strip_tags
from swim_fast.evaluation.judge import DIMENSIONS, PROMPT_VERSION, JudgeTask, judge
from swim_fast.evaluation.predictions import stored_settings
from swim_fast.evaluation.prompts import make_prompt, make_record, read_items, read_question_text, read_text
from swim_fast.evaluation.run import Batch, Ranks, Run, Work
from swim_fast.inference.generation import generate
from swim_fast.jobs import Descriptions
from swim_fast.llm.settle import Outcome


@dataclass(frozen=True)
class Description:
    """One record: its prompt as a record, and the correct description."""

    record: Record
    caption: str


def read_description(records: RecordFile, entry: dict[str, Any], index: int) -> Description:
    """Return the item of an entry, whose keys are in lower case.

    Raises:
        DataError: for whatever is missing.
    """
    if entry.get("caption") is None and entry.get("conversations") is not None:
        answers = [turn.text for turn in read_turns(entry) if turn.role == "assistant"]
        entry = {**entry, "caption": answers[0] if answers else None}
    caption = strip_tags(read_text(entry, "caption"))[0].strip()
    return Description(make_record(records, entry, index, read_question_text(entry)), caption)


def evaluate_descriptions(options: Descriptions, ranks: Ranks) -> dict[str, Any] | None:
    """Describe the objects of a file, and have the descriptions judged.

    Returns:
        The results of `score_descriptions`, on the first rank; None on the others.

    Raises:
        DataError: the file cannot be read, or none of its records can be used.
        CheckpointError: the model cannot be loaded.
        PredictionsError: the folder holds predictions of another run, or none to judge.
        EndpointError: the judge cannot be asked.
    """
    run = Run(options, ranks)
    items, problems, kind = read_items(run.records, run.indices, read_description)
    settings = run.settings("descriptions", max_new_tokens=options.max_new_tokens, frame_mode=options.frame_mode)
    if options.judge_only:  # whatever the predictions were made with, as long as it is this model on this file
        named = ("evaluation", "model", "file", "contents")
        settings = {**stored_settings(Path(options.out)), **{name: settings[name] for name in named}}

    def prepare() -> Work:
        model, processor = run.load()
        builder = run.sample_builder(processor)

        def predict(batch: Batch) -> list[dict[str, Any]]:
            said = generate(model, processor, [sample for _, sample in batch], options.max_new_tokens)
            return [{"description": text.strip()} for text in said]

        return Work(lambda index: make_prompt(builder, items[index].record), predict)

    entries = run.predict(list(items), settings, None if options.judge_only else prepare, "describing")
    if entries is None:
        return None
    outcomes = None
    if options.judge_model is not None:
        tasks = [
            JudgeTask(index, item.caption, entries[index]["description"])
            for index, item in items.items()
            if "description" in entries.get(index, {})
        ]
        journal = Path(options.journal or Path(options.out) / "judge.journal.jsonl")
        outcomes = judge(tasks, options.endpoint(options.judge_model), journal, options.attempts)
        settings = {
            **settings,
            "judge": options.judge_model,
            "judge_temperature": options.temperature,
            "judge_prompt": PROMPT_VERSION,
        }
    return {"settings": settings, "kind": kind, **score_descriptions(items, entries, problems, outcomes)}


def score_descriptions(
    items: Mapping[int, Description],
    entries: Mapping[int, Mapping[str, Any]],
    problems: Mapping[int, str],
    outcomes: Mapping[int, Outcome[tuple[int, ...]]] | None,
) -> dict[str, Any]:
    """Average the scores.

    Args:
        items: the records by index.
        entries: predictions and problems of clips by record index.
        problems: what is wrong with records that could not be read.
        outcomes: the judge's, for every description; None where nobody judged.

    Returns:
        `described`: number of descriptions; `problems`: record index -> why there is none, which counts nowhere;
        `scores`: record index -> the four scores; `failed`: record index -> why there are none though the judge was
        asked, which count nowhere either; `means`: by dimension over the scores, and `average`: the mean of the means;
        None without scores.
    """
    problems = dict(problems)
    for index in items:
        entry = entries.get(index, {"problem": "was not described"})
        if "problem" in entry:
            problems[index] = entry["problem"]
    judged = outcomes or {}
    scores = {n: dict(zip(DIMENSIONS, o.result, strict=True)) for n, o in judged.items() if o.result is not None}
    means = {name: sum(row[name] for row in scores.values()) / len(scores) for name in DIMENSIONS} if scores else None
    return {
        "described": sum(index not in problems for index in items),
        "problems": dict(sorted(problems.items())),
        "scores": scores,
        "failed": {n: outcome.reason for n, outcome in judged.items() if outcome.result is None},
        "means": means,
        "average": sum(means.values()) / len(DIMENSIONS) if means else None,
    }
