"""VideoRefer-Bench-Q: multiple-choice questions about objects, by the letter in the answer or by likelihood.

A record: `Question`, `options` (["(A) A helmet", …]), `Answer` ("(A) A helmet", "(A)" or "A"), `type`, and the clip, as
in `swim_fast.evaluation.prompts`. Options without letters get them in their order. An object {"A": "A helmet", …} in
place of the list, and `choices` in place of `options`, do as well. Tags are removed from options and answers too.

The prompt is that of the published evaluation: question, options, and "Answer with the option's letter from the given
choices directly.", separated by spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.data.source.tags import strip_tags
from swim_fast.evaluation.prompts import make_prompt, make_record, read_items, read_question_text, read_text
from swim_fast.evaluation.published import QUESTION_TYPES
from swim_fast.evaluation.run import Batch, Ranks, Run, Work
from swim_fast.inference.generation import generate, score_texts
from swim_fast.jobs import Questions

# Rules that read a letter, by the way of answering; the first is the one that is put beside published numbers.
READINGS = {"generation": ("published", "lenient"), "likelihood": ("letter", "total", "mean")}

_OPTION = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[).:])\s*(.*)", re.DOTALL)
_DIRECTLY = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One record: its prompt as a record, the options "(A) …" in order, the right letter, and the type of question."""

    record: Record
    options: tuple[str, ...]
    answer: str
    type: str

    @property
    def letters(self) -> str:
        return "".join(option[1] for option in self.options)


def read_question(records: RecordFile, entry: dict[str, Any], index: int) -> Question:
    """Return the question of an entry, whose keys are in lower case.

    Raises:
        DataError: for whatever is missing or contradictory.
    """
    options = _read_options(entry)
    question = read_question_text(entry)
    prompt = f"{question} {' '.join(options)}. {_DIRECTLY}"
    kind = entry.get("type")
    record = make_record(records, entry, index, prompt)
    return Question(
        record, options, _read_right_letter(entry, options), kind if isinstance(kind, str) and kind else "untyped"
    )


def _read_options(entry: dict[str, Any]) -> tuple[str, ...]:
    given = entry.get("options", entry.get("choices"))
    if isinstance(given, dict):
        given = [f"({letter}) {text}" for letter, text in given.items()]
    if (
        not isinstance(given, list)
        or len(given) < 2
        or not all(isinstance(text, str) and text.strip() for text in given)
    ):
        raise DataError('is no list of two or more texts such as "(A) A helmet"', key="options")
    given = [strip_tags(text)[0] for text in given]
    found = [_OPTION.fullmatch(text) for text in given]
    if not all(found):
        found = [None] * len(given)
    if len(given) > 26:
        raise DataError(f"{len(given)} options are more than there are letters", key="options")
    options = tuple(
        f"({(match[1] or match[2]).upper()}) {match[3].strip()}" if match else f"({chr(65 + i)}) {text.strip()}"
        for i, (match, text) in enumerate(zip(found, given, strict=True))
    )
    if len({option[1] for option in options}) < len(options):
        raise DataError(f"two options have one letter: {', '.join(options)}", key="options")
    return options


def _read_right_letter(entry: dict[str, Any], options: Sequence[str]) -> str:
    text = strip_tags(read_text(entry, "answer"))[0].strip()
    letters = {option[1]: option for option in options}
    match = _OPTION.fullmatch(text)
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    if match and (match[1] or match[2]).upper() in letters:
        return (match[1] or match[2]).upper()
    same = [letter for letter, option in letters.items() if option[4:].strip().lower() == text.lower()]
    if len(same) == 1:
        return same[0]
    raise DataError(f"the answer {text!r} is none of the options {', '.join(options)}", key="Answer")


def published_letter(said: str, letters: str) -> str | None:
    """Return the option that an answer names by the published rule; None if that is the letter of no option.

    The rule takes the first "(X)", else the first "X)", both with a capital X, else the first character that is no full
    stop. White space around the answer does not count.
    """
    said = said.strip()
    if match := re.search(r"\(([A-Z])\)", said) or re.search(r"([A-Z])\)", said):
        letter = match[1]
    else:
        letter = said.replace(".", "")[:1].upper()
    return letter if letter and letter in letters else None


def lenient_letter(said: str, letters: str) -> str | None:
    """Return the one option that an answer names in any of the usual forms; None if it names none or several.

    In this order: "(B)", in either case and also with full-width brackets; "B)", "(B"; a first word "B", "b." or "B:";
    "answer is B", "option B"; a lone capital anywhere. White space, asterisks and quotation marks around do not matter.
    """
    text = unicodedata.normalize("NFKC", said)  # full-width forms become ASCII
    one = f"([{letters}{letters.lower()}])"
    capital = f"([{letters}])"
    forms = (
        rf"\(\s*{one}\s*\)",
        rf"(?<!\w){one}\)|\(\s*{one}(?!\w)",
        rf"^[\s*\"'“`]*{one}(?=[\s*\"'”`]*(?:[.:,;]|$))",
        rf"(?i:\b(?:answer|option|choice)(?:\s+is|\s*:)?\s+[*\"'“`]*){capital}(?!\w)(?!\s+or\b)",
        rf"(?<![\w'’]){capital}(?![\w'’])",
    )
    for form in forms:
        found = {next(filter(None, match.groups())).upper() for match in re.finditer(form, text)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def evaluate_questions(options: Questions, ranks: Ranks) -> dict[str, Any] | None:
    """Answer the questions of a file and count the right answers.

    Returns:
        The results of `score_questions`, on the first rank; None on the others.

    Raises:
        DataError: the file cannot be read, or none of its records can be used.
        CheckpointError: the model cannot be loaded.
        PredictionsError: the folder holds predictions of another run.
    """
    run, by = Run(options, ranks), options.by
    items, problems, kind = read_items(run.records, run.indices, read_question)
    settings = run.settings("questions", by=by, max_new_tokens=options.max_new_tokens if by == "generation" else None)

    def prepare() -> Work:
        model, processor = run.load()
        builder = run.sample_builder(processor)

        def predict(batch: Batch) -> list[dict[str, Any]]:
            prompts = [sample for _, sample in batch]
            if by == "generation":
                return [{"answer": text} for text in generate(model, processor, prompts, options.max_new_tokens)]
            texts = [[builder.render.gap + option for option in items[index].options] for index, _ in batch]
            scored = (
                score_texts(model, processor, *asked, options.batch_size) for asked in zip(prompts, texts, strict=True)
            )
            return [{"scores": [asdict(score) for score in scores]} for scores in scored]

        return Work(lambda index: make_prompt(builder, items[index].record), predict)

    entries = run.predict(list(items), settings, prepare, "answering")
    if entries is None:
        return None
    return {"settings": settings, "kind": kind, **score_questions(items, entries, problems, by)}


def read_letters(question: Question, entry: Mapping[str, Any], by: str) -> dict[str, str | None]:
    """Return the letter that a prediction gives, by each of the `READINGS`; None where it gives none."""
    if by == "generation":
        readers = {"published": published_letter, "lenient": lenient_letter}
        return {name: read(entry["answer"], question.letters) for name, read in readers.items()}
    best = {name: max(range(len(question.options)), key=lambda i: entry["scores"][i][name]) for name in READINGS[by]}
    return {name: question.letters[option] for name, option in best.items()}


def score_questions(
    items: Mapping[int, Question], entries: Mapping[int, Mapping[str, Any]], problems: Mapping[int, str], by: str
) -> dict[str, Any]:
    """Count the right answers.

    Args:
        items: the questions by record index.
        entries: predictions and problems of clips by record index.
        problems: what is wrong with records that could not be read.
        by: "generation" or "likelihood".

    Returns:
        `readings`: for each of the `READINGS`, under `types` (and `all`) the number of answers, of `right` and of
        `unparsable` ones (which count as wrong) and the `accuracy`, in per cent; `problems`: record index -> why there
        is no answer, which counts nowhere; `answers`: record index -> letters.
    """
    problems = dict(problems)
    answers: dict[int, dict[str, Any]] = {}
    for index, question in items.items():
        entry = entries.get(index, {"problem": "was not asked"})
        if "problem" in entry:
            problems[index] = entry["problem"]
        else:
            letters = read_letters(question, entry, by)
            answers[index] = {"type": question.type, "right": question.answer, **letters}
    found = [answer["type"] for answer in answers.values()]
    order = [*(name for name in QUESTION_TYPES if name in found), *sorted(set(found) - set(QUESTION_TYPES))]
    readings = {
        reading: {
            "types": {
                name: _count([answer for answer in answers.values() if answer["type"] == name], reading)
                for name in order
            },
            "all": _count(list(answers.values()), reading),
        }
        for reading in READINGS[by]
    }
    return {"by": by, "readings": readings, "problems": dict(sorted(problems.items())), "answers": answers}


def _count(answers: Sequence[Mapping[str, Any]], reading: str) -> dict[str, Any]:
    right = sum(answer[reading] == answer["right"] for answer in answers)
    unparsable = sum(answer[reading] is None for answer in answers)
    accuracy = 100 * right / len(answers) if answers else None
    return {"answers": len(answers), "right": right, "unparsable": unparsable, "accuracy": accuracy}
