"""VideoRefer-Bench-Q: multiple-choice questions about objects, by the letter in the answer or by likelihood.

A record: ``Question``, ``options`` (["(A) A helmet", …]), ``Answer`` ("(A) A helmet", "(A)" or "A"), ``type``, and the
clip, see `swim_fast.evaluation.benchmark`. Options without letters are given them in their order; an object
{"A": "A helmet", …} in the place of the list, and ``choices`` in the place of ``options``, do as well.

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
from swim_fast.evaluation.benchmark import prompt_record, prompt_sample, question_of, read_items, text_under
from swim_fast.evaluation.predictions import Predictions
from swim_fast.evaluation.published import QUESTION_TYPES
from swim_fast.evaluation.ranks import Ranks
from swim_fast.evaluation.run import RunOptions, predict_rest
from swim_fast.inference.generation import generate, load_model, text_scores

WAYS = ("generation", "likelihood")
# What counts as the answer, by way; the first is the one that is put beside published numbers.
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


def read_question(records: RecordFile, entry: dict[str, Any], number: int) -> Question:
    """The question of an entry, whose keys are in lower case.

    Raises:
        DataError: for whatever is missing or contradictory.
    """
    options = _options(entry)
    question = question_of(entry)
    prompt = f"{question} {' '.join(options)}. {_DIRECTLY}"
    kind = entry.get("type")
    record = prompt_record(records, entry, number, prompt)
    return Question(record, options, _right(entry, options), kind if isinstance(kind, str) and kind else "untyped")


def _options(entry: dict[str, Any]) -> tuple[str, ...]:
    given = entry.get("options", entry.get("choices"))
    if isinstance(given, dict):
        given = [f"({letter}) {text}" for letter, text in given.items()]
    if (
        not isinstance(given, list)
        or len(given) < 2
        or not all(isinstance(text, str) and text.strip() for text in given)
    ):
        raise DataError('is no list of two or more texts such as "(A) A helmet"', key="options")
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


def _right(entry: dict[str, Any], options: Sequence[str]) -> str:
    text = text_under(entry, "answer").strip()
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
    """The option that an answer names by the published rule: the first "(X)", else the first "X)", both with a capital
    X, else the first character that is no full stop; white space around the answer does not count. None where that is
    the letter of no option.
    """
    said = said.strip()
    if match := re.search(r"\(([A-Z])\)", said) or re.search(r"([A-Z])\)", said):
        letter = match[1]
    else:
        letter = said.replace(".", "")[:1].upper()
    return letter if letter and letter in letters else None


def lenient_letter(said: str, letters: str) -> str | None:
    """The one option that an answer names in any of the usual forms; None where it names none or several.

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


def evaluate_questions(
    options: RunOptions, ranks: Ranks, by: str = "generation", max_new_tokens: int = 16
) -> dict | None:
    """Answer the questions of a file and count the right answers.

    Args:
        options, ranks: how the model is run.
        by: "generation", the letter in the model's greedy answer, or "likelihood", the option that it finds likeliest.
        max_new_tokens: most tokens of an answer.

    Returns:
        What `score_questions` makes of it, on the first rank; None on the others.

    Raises:
        DataError: the file cannot be read, or none of its records can be used.
        ValueError: a model that cannot be loaded; predictions of another run in the folder.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    records = RecordFile(options.file, options.media)
    items, problems = read_items(records, options.count(len(records)), read_question)
    settings = options.settings("questions", by=by, max_new_tokens=max_new_tokens if by == "generation" else None)
    with Predictions(options.out, settings) as predictions:
        if any(number not in predictions.done for number in items):
            model, processor = load_model(options.model, options.dtype, options.attention, ranks.device)
            builder = options.sample_builder(processor)

            def answer(batch):
                prompts = [sample for _, sample in batch]
                if by == "generation":
                    said = generate(model, processor, prompts, max_new_tokens)
                    return [{"answer": text} for text in said]
                chosen = zip(prompts, (items[number].options for number, _ in batch), strict=True)
                scores = (text_scores(model, processor, prompt, texts, options.batch_size) for prompt, texts in chosen)
                return [{"scores": [asdict(score) for score in found]} for found in scores]

            predict_rest(
                list(items),
                lambda number: prompt_sample(builder, items[number].record),
                answer,
                predictions,
                options,
                ranks,
                desc="answering",
            )
        if ranks.rank:
            return None
        return {"settings": settings, **score_questions(items, predictions.entries(), problems, by)}


def read_letters(question: Question, entry: Mapping[str, Any], by: str) -> dict[str, str | None]:
    """The letter that a prediction gives, by each of the `READINGS`; None where it gives none."""
    if by == "generation":
        readers = {"published": published_letter, "lenient": lenient_letter}
        return {name: read(entry["answer"], question.letters) for name, read in readers.items()}
    best = {name: max(range(len(question.options)), key=lambda i: entry["scores"][i][name]) for name in READINGS[by]}
    return {name: question.letters[place] for name, place in best.items()}


def score_questions(
    items: Mapping[int, Question], entries: Mapping[int, Mapping[str, Any]], problems: Mapping[int, str], by: str
) -> dict[str, Any]:
    """Count the right answers.

    Args:
        items: the questions by record number.
        entries: predictions and problems of clips by record number.
        problems: of records that could not be read.
        by: one of `WAYS`.

    Returns:
        ``readings``: for each of the `READINGS`, under ``types`` (and ``all``) the number of answers, of ``right`` and
        of ``unparsable`` ones (which count as wrong) and the ``accuracy``, in per cent; ``problems``: record number ->
        why there is no answer, which counts nowhere; ``answers``: record number -> letters.
    """
    problems = dict(problems)
    answers: dict[int, dict[str, Any]] = {}
    for number, question in items.items():
        entry = entries.get(number, {"problem": "was not asked"})
        if "problem" in entry:
            problems[number] = entry["problem"]
        else:
            letters = read_letters(question, entry, by)
            answers[number] = {"type": question.type, "right": question.answer, **letters}
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
