"""A language model as judge of descriptions: what it is asked, what is read out of its answer, who is asked again.

Four scores from 0 to 5, whole numbers, as VideoRefer-Bench-D has them. An answer that does not give all four is
rejected with the reason and asked for again; after the last attempt the description counts as not judged, never as 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim_fast.llm.journal import Journal, answer_key
from swim_fast.llm.json_answer import final_text, find_values
from swim_fast.llm.settle import AnswerError, Outcome, Request, Settler
from swim_fast.options import Endpoint

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


@dataclass(frozen=True)
class JudgeTask:
    """A description to be judged: the record's index, its correct description and the predicted one."""

    index: int
    caption: str
    description: str


def messages(task: JudgeTask) -> list[dict[str, str]]:
    """Return the chat that asks for the scores of a description."""
    user = f"##Correct answer: {task.caption}\n##Predicted answer: {task.description}\n"
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}]


def read_scores(answer: str) -> tuple[int, ...]:
    """Return the four scores of a judge's answer, by `DIMENSIONS`.

    Understood are JSON and Python dicts, also inside code fences and prose or nested in one another, names in any case
    or spelling of their first word, and lines "name: score"; scores as numbers, as texts such as "4" and "4/5", or
    under "score". Of several dicts the last one that names a dimension counts.

    Raises:
        AnswerError: no scores, a dimension without score, or one that is no whole number from 0 to 5.
    """
    answer = final_text(answer)
    found: dict[int, Any] = {}
    for candidate in _dicts(answer):
        found = _by_dimension(candidate) or found
    if not found:
        found = _by_line(answer)
    if not found:
        raise AnswerError(f"the answer names none of the dimensions {', '.join(DIMENSIONS)}")
    if missing := [name for i, name in enumerate(DIMENSIONS) if i not in found]:
        raise AnswerError(f"there is no score for {' and '.join(missing)}")
    return tuple(_read_score(found[i], name) for i, name in enumerate(DIMENSIONS))


def _dicts(answer: str) -> Iterator[dict]:
    for value in find_values(answer):
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, dict):
                yield part


def _find_dimension(name: Any) -> int | None:
    words = re.findall(r"[a-z]+", name.lower()) if isinstance(name, str) else []
    for index, (initials, beginning) in enumerate(zip(_INITIALS, _BEGINNINGS, strict=True)):
        # "SubjectCorrespondence" and "Hallucinaton Detection" are meant well
        if words and (words[0] == initials or words[0].startswith(beginning)):
            return index
    return None


def _by_dimension(values: Mapping[Any, Any]) -> dict[int, Any]:
    found = {index: value for name, value in values.items() if (index := _find_dimension(name)) is not None}
    if found:
        return found
    inner = (_by_dimension(value) for value in values.values() if isinstance(value, Mapping))
    return next(filter(None, inner), {})


def _by_line(answer: str) -> dict[int, str]:
    found = {}
    for line in answer.splitlines():
        match = re.match(r"[\s*#\-\d.()]*([A-Za-z][A-Za-z ]*?)[\s*]*(?:\([A-Z]{2}\))?[\s*]*[:=][\s*]*(.+)", line)
        index = _find_dimension(match[1]) if match else None
        if index is not None:
            found[index] = match[2]
    return found


def _read_score(value: Any, name: str) -> int:
    if isinstance(value, Mapping):
        value = next((inner for key, inner in value.items() if str(key).lower() == "score"), value)
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())) and match[2] in (None, "5"):
        number = float(match[1])
    if number is None or number != number or number not in range(6):
        raise AnswerError(f"the score for {name} is {value!r}; it must be a whole number from 0 to 5")
    return int(number)


def judge(
    tasks: Sequence[JudgeTask], endpoint: Endpoint, journal: Path, attempts: int = 3, progress: bool = True
) -> dict[int, Outcome[tuple[int, ...]]]:
    """Have descriptions judged until each has its scores or no attempt is left.

    Args:
        tasks: descriptions to be judged.
        endpoint: the judge.
        journal: file of the answers; what is in it is not asked again.
        attempts: most answers per description.
        progress: show a progress bar.

    Returns:
        The outcome of each task by the record's index; its result are the scores by `DIMENSIONS`.

    Raises:
        EndpointError: the endpoint cannot be used; what was answered is in the journal.
        FileInUseError: another run uses the journal.
        MissingLibraryError: openai is missing.
    """
    requests = [_make_request(task, endpoint) for task in tasks]
    with Journal(journal) as answers:
        settler = Settler(endpoint, answers, attempts)
        rest = [request for request in requests if settler.outcome(request).chat is not None]
        if rest:  # else the judge need not be there
            settler.settle(rest, len(rest), "judging", progress)
        return {request.index: settler.outcome(request) for request in requests}


def _make_request(task: JudgeTask, endpoint: Endpoint) -> Request[tuple[int, ...]]:
    chat = messages(task)
    key = answer_key(task.index, {"temperature": endpoint.temperature}, endpoint.model, chat)
    return Request(task.index, key, chat, read_scores)
