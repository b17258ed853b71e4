"""A language model as judge of descriptions: what it is asked, what is read out of its answer, who is asked again.

Four scores from 0 to 5, whole numbers, as VideoRefer-Bench-D has them. An answer that does not give all four is
objected to with the reason and asked for again; after the last attempt the description counts as not judged, never as
0. Answers are kept in a journal (`swim_fast.llm.journal`) and judged anew whenever they are read.
"""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from swim_fast.llm.endpoint import Endpoint, EndpointOptions, RefusedError, run_workers
from swim_fast.llm.journal import Journal, answer_key

logger = logging.getLogger(__name__)

DIMENSIONS = ("Subject Correspondence", "Appearance Description", "Temporal Description", "Hallucination Detection")
PROMPT_VERSION = "swim-fast 1"  # recorded beside the scores; to be raised with every change of the prompt

_SYSTEM = """\
You compare a predicted description of one object in a video with the correct description, and score the prediction in \
four dimensions. Each score is a whole number from 0 (worst) to 5 (best).

- "Subject Correspondence": is the described subject the one of the correct description? 5: certainly the same; \
0: another one.
- "Appearance Description": do colour, shape, clothing, texture and other visible attributes agree with the correct \
description? 5: all that matter are there and right; 0: none is.
- "Temporal Description": do actions, motion and changes over time agree? 5: they do; 0: they are missing or wrong.
- "Hallucination Detection": is the prediction free of facts, actions and things that the correct description does not \
bear out? 5: nothing is made up; 0: nearly everything is.

Answer with JSON and nothing else:
{"Subject Correspondence": 4, "Appearance Description": 3, "Temporal Description": 5, "Hallucination Detection": 4}"""

_INITIALS = ("sc", "ad", "td", "hd")
_BEGINNINGS = ("subject", "appear", "tempor", "hallucin")
_NUMBER = re.compile(r"[^\d+-]*([+-]?\d+(?:\.\d+)?)\s*(?:(?:/|out of)\s*(\d+)\b)?[^\d]*")


class UnreadableError(ValueError):
    """An answer from which the four scores cannot be read; the text is an objection to the judge."""


@dataclass(frozen=True)
class Verdict:
    """What a judge's answers for one description come to.

    Attributes:
        scores: by `DIMENSIONS`, or None.
        reason: why there are none.
        answers: how many answers there were.
    """

    scores: tuple[int, ...] | None
    reason: str
    answers: int


@dataclass(frozen=True)
class JudgeTask:
    """A description to be judged: the record's number, its correct description and the predicted one."""

    number: int
    caption: str
    description: str


def messages(task: JudgeTask) -> list[dict[str, str]]:
    """The chat that asks for the scores of a description."""
    user = f"##Correct answer: {task.caption}\n##Predicted answer: {task.description}\n"
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}]


def read_scores(answer: str) -> tuple[int, ...]:
    """The four scores of a judge's answer, by `DIMENSIONS`.

    Understood are JSON and Python dicts, also inside code fences and prose or nested in one another, names in any case
    or spelling of their first word, and lines "name: score"; scores as numbers, as texts such as "4" and "4/5", or
    under "score". Of several dicts the last one that names a dimension counts.

    Raises:
        UnreadableError: no scores, a dimension without score, or one that is no whole number from 0 to 5.
    """
    answer = answer.rpartition("</think>")[2]  # of models that think aloud
    found: dict[int, Any] = {}
    for candidate in _dicts(answer):
        found = _by_dimension(candidate) or found
    if not found:
        found = _by_line(answer)
    if not found:
        raise UnreadableError(f"the answer names none of the dimensions {', '.join(DIMENSIONS)}")
    if missing := [name for i, name in enumerate(DIMENSIONS) if i not in found]:
        raise UnreadableError(f"there is no score for {' and '.join(missing)}")
    return tuple(_whole(found[i], name) for i, name in enumerate(DIMENSIONS))


def _dicts(answer: str) -> Iterator[dict]:
    """The outermost dicts in a text, JSON or Python."""
    decoder, place = json.JSONDecoder(), 0
    while (place := answer.find("{", place)) >= 0:
        value, end = None, place + 1
        try:
            value, end = decoder.raw_decode(answer, place)
        except (ValueError, RecursionError):
            for match in re.finditer(r"\}", answer[place:]):
                try:
                    value = ast.literal_eval(answer[place : place + match.end()])
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    continue
                end = place + match.end()
                break
        if isinstance(value, dict):
            yield value
        place = end


def _dimension(name: Any) -> int | None:
    words = re.findall(r"[a-z]+", name.lower()) if isinstance(name, str) else []
    for place, (initials, beginning) in enumerate(zip(_INITIALS, _BEGINNINGS, strict=True)):
        # "SubjectCorrespondence" and "Hallucinaton Detection" are meant well
        if words and (words[0] == initials or words[0].startswith(beginning)):
            return place
    return None


def _by_dimension(values: Mapping[Any, Any]) -> dict[int, Any]:
    found = {place: value for name, value in values.items() if (place := _dimension(name)) is not None}
    if found:
        return found
    inner = (_by_dimension(value) for value in values.values() if isinstance(value, Mapping))
    return next(filter(None, inner), {})


def _by_line(answer: str) -> dict[int, str]:
    found = {}
    for line in answer.splitlines():
        match = re.match(r"[\s*#\-\d.()]*([A-Za-z][A-Za-z ]*?)[\s*]*(?:\([A-Z]{2}\))?[\s*]*[:=][\s*]*(.+)", line)
        place = _dimension(match[1]) if match else None
        if place is not None:
            found[place] = match[2]
    return found


def _whole(value: Any, name: str) -> int:
    if isinstance(value, Mapping):
        value = next((inner for key, inner in value.items() if str(key).lower() == "score"), value)
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())) and match[2] in (None, "5"):
        number = float(match[1])
    if number is None or number != number or number not in range(6):
        raise UnreadableError(f"the score for {name} is {value!r}; it must be a whole number from 0 to 5")
    return int(number)


def judge(
    tasks: Sequence[JudgeTask], endpoint: EndpointOptions, journal: Path, attempts: int = 3, progress: bool = True
) -> dict[int, Verdict]:
    """Have descriptions judged until each has its scores or no attempt is left.

    Args:
        tasks: what is to be judged.
        endpoint: the judge.
        journal: file of the answers; what is in it is not asked again.
        attempts: answers per description until one can be read.
        progress: show a progress bar.

    Returns:
        record number -> verdict, for each of the tasks.

    Raises:
        EndpointError: the endpoint cannot be used; what was answered is in the journal.
        BlockingIOError: another run uses the journal.
        ImportError: openai is missing.
    """
    with Journal(journal) as answers, logging_redirect_tqdm():
        refused: dict[int, str] = {}

        def key(task: JudgeTask) -> str:
            return answer_key(task.number, {"temperature": endpoint.temperature}, endpoint.model, messages(task))

        def verdict(task: JudgeTask) -> tuple[Verdict, list[dict[str, str]]]:
            return _verdict(task, [answer.answer for answer in answers.answers(key(task))])

        def is_open(task: JudgeTask) -> bool:
            found, _ = verdict(task)
            return found.scores is None and found.answers < attempts

        rest = [task for task in tasks if is_open(task)]
        if rest:
            with tqdm(total=len(rest), desc="judging", unit="record", disable=not progress) as bar:
                asyncio.run(_ask(iter(rest), key, verdict, attempts, endpoint, answers, refused, bar))
        verdicts = {task.number: verdict(task)[0] for task in tasks}
    for number, reason in refused.items():
        if verdicts[number].scores is None:
            verdicts[number] = Verdict(None, f"refused by the endpoint: {reason}", verdicts[number].answers)
    return verdicts


def _verdict(task: JudgeTask, answers: Sequence[str]) -> tuple[Verdict, list[dict[str, str]]]:
    """What the answers come to, and the chat that asks (again)."""
    chat, reason = messages(task), "the judge was not asked"
    for count, answer in enumerate(answers, 1):
        try:
            return Verdict(read_scores(answer), "", count), chat
        except UnreadableError as error:
            reason = str(error)
            again = f"That will not do: {reason}. Answer again with the whole JSON and nothing else."
            chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
    return Verdict(None, reason, len(answers)), chat


async def _ask(tasks: Iterator[JudgeTask], key, verdict, attempts, options, journal, refused, bar) -> None:
    endpoint = Endpoint(options)

    async def settle_all() -> None:
        for task in tasks:  # shared by all workers
            await settle(task)
            bar.update()

    async def settle(task: JudgeTask) -> None:
        while True:
            found, chat = verdict(task)
            if found.scores is not None or found.answers >= attempts:
                return
            try:
                journal.add(key(task), task.number, await endpoint.ask(chat))
            except RefusedError as error:
                refused[task.number] = str(error)
                logger.warning("record %d is not judged: %s", task.number, error)
                return

    def ended(whole: bool) -> None:
        if not whole:
            logger.warning("stopped; the answers so far are in %s, the same command goes on", journal.path)

    await run_workers(endpoint, settle_all, ended)
