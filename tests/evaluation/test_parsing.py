"""What is read out of answers, of the model and of the judge, case by case; averages by hand."""

import pytest

from swim_fast.evaluation.descriptions import score_descriptions
from swim_fast.evaluation.judge import DIMENSIONS, read_scores
from swim_fast.evaluation.questions import Question, lenient_letter, published_letter, score_questions
from swim_fast.llm.settle import AnswerError, Outcome


@pytest.mark.parametrize(
    "said, published, lenient",
    [
        ("(B)", "B", "B"),
        ("The answer is (B).", "B", "B"),
        ("B) because", "B", "B"),
        ("b", "B", "B"),
        ("(b)", None, "B"),
        ("(C", None, "C"),
        ("A. dog", "A", "A"),
        (".A", "A", "A"),
        ("I think it is A or B", None, None),
        ("I think it is (A) or (B)", "A", None),
        ("", None, None),
        (" \n", None, None),
        ("...", None, None),
        ("（B）", None, "B"),
        ("The answer is B", None, "B"),
        ("the answer is b.", None, None),
        ("Answer: **C**", "A", "C"),  # the published rule takes the first character
        ("D: a watch", "D", "D"),
        ("Because of the dog", "B", None),
        ("(E) none of these", None, None),
        ("A helmet, option C", "A", "C"),
        ("E", None, None),
        ("  D\n", "D", "D"),
    ],
)
def test_letters(said, published, lenient):
    assert published_letter(said, "ABCD") == published
    assert lenient_letter(said, "ABCD") == lenient


GOOD = (4, 3, 5, 2)


@pytest.mark.parametrize(
    "answer",
    [
        '{"Subject Correspondence": 4, "Appearance Description": 3, "Temporal Description": 5, '
        '"Hallucination Detection": 2}',
        "{'Subject Correspondence': 4, 'Appearance Description': 3, 'Temporal Description': 5, "
        "'Hallucination Detection': 2}",
        "Sure {here}!\n```python\n{'Subject Correspondence': 4, 'Appearance Description': 3,\n'Temporal Description': "
        "5, 'Hallucinaton Detection': 2}\n```\nI gave {3} for looks.",
        '{"subject_correspondence": "4", "appearance": "3/5", "TemporalDescription": 5.0, "hallucination": "2 / 5"}',
        '{"scores": {"SC": 4, "AD": {"reason": "hat", "Score": 3}, "TD": 5, "HD": 2}, "score": 1}',
        "<think>{'SC': 1, 'AD': 1, 'TD': 1, 'HD': 1}</think>{'SC': 4, 'AD': 3, 'TD': 5, 'HD': 2}",
        "First {'SC': 1, 'AD': 1, 'TD': 1, 'HD': 1}, no: {'SC': 4, 'AD': 3, 'TD': 5, 'HD': 2}",
        "1. **Subject Correspondence (SC):** 4/5\n2. Appearance Description: 3\n- Temporal Description = 5 - well seen"
        "\nHallucination Detection: Score: 2 out of 5",
    ],
)
def test_scores_in_every_dress(answer):
    assert read_scores(answer) == GOOD


@pytest.mark.parametrize(
    "change, reason",
    [
        (6, "Temporal Description is 6"),
        (-1, "Temporal Description is -1"),
        (3.5, "Temporal Description is 3.5"),
        ("'Score: 3.5'", "'Score: 3.5'; it must be a whole number from 0 to 5"),
        ("'7/10'", "'7/10'"),
        ("'3-4'", "'3-4'"),
        ("True", "True"),
        ("None", "None"),
        ("'good'", "'good'"),
        ("float('nan')", "names none"),
    ],
)
def test_scores_that_are_none(change, reason):
    answer = f"{{'SC': 4, 'AD': 3, 'TD': {change}, 'HD': 2}}"
    with pytest.raises(AnswerError, match="none of the dimensions" if "none" in reason else None) as error:
        read_scores(answer)
    assert reason in str(error.value)


def test_a_missing_dimension_is_named():
    with pytest.raises(AnswerError, match="no score for Appearance Description and Hallucination Detection"):
        read_scores('{"Subject Correspondence": 4, "Temporal Description": 0}')
    with pytest.raises(AnswerError, match="none of the dimensions"):
        read_scores("A fine description.")


def test_accuracy_by_type_and_overall():
    options = tuple(f"({letter}) x" for letter in "ABCD")
    items = {n: Question(None, options, "B", "Basic Questions" if n < 4 else "My type") for n in range(7)}
    answers = ["(B)", "(A)", "nothing", "(b)", "B", "C"]
    entries = {n: {"answer": text} for n, text in enumerate(answers)} | {6: {"problem": "broken"}}
    found = score_questions(items, entries, {9: "malformed"}, "generation")
    published, lenient = (found["readings"][name] for name in ("published", "lenient"))
    assert published["types"] == {
        "Basic Questions": {"answers": 4, "right": 1, "unparsable": 2, "accuracy": 25.0},
        "My type": {"answers": 2, "right": 1, "unparsable": 0, "accuracy": 50.0},
    }
    assert published["all"] == {"answers": 6, "right": 2, "unparsable": 2, "accuracy": pytest.approx(100 / 3)}
    assert lenient["types"]["Basic Questions"] == {"answers": 4, "right": 2, "unparsable": 1, "accuracy": 50.0}
    assert found["problems"] == {6: "broken", 9: "malformed"}


def test_likelihood_takes_the_best_option():
    items = {0: Question(None, ("(A) x", "(B) y"), "B", "Basic Questions")}
    scores = [{"letter": -1.0, "total": -9.0, "mean": -3.0}, {"letter": -2.0, "total": -8.0, "mean": -4.0}]
    found = score_questions(items, {0: {"scores": scores}}, {}, "likelihood")
    assert [found["answers"][0][name] for name in ("letter", "total", "mean")] == ["A", "B", "A"]
    assert [found["readings"][name]["all"]["right"] for name in ("letter", "total", "mean")] == [0, 1, 0]


def test_means_leave_out_what_was_not_judged():
    entries = {n: {"description": "x"} for n in range(3)} | {3: {"problem": "broken"}}
    outcomes = {
        0: Outcome((5, 4, 3, 2), "", ("x",)),
        1: Outcome((3, 1, 0, 4), "", ("x",) * 2),
        2: Outcome(None, "no scores", ("x",) * 3),
    }
    found = score_descriptions(dict.fromkeys(range(4)), entries, {}, outcomes)
    assert found["means"] == dict(zip(DIMENSIONS, (4.0, 2.5, 1.5, 3.0), strict=True))
    assert found["average"] == pytest.approx(2.75)
    assert found["failed"] == {2: "no scores"} and found["problems"] == {3: "broken"} and found["described"] == 3
    nobody = score_descriptions(dict.fromkeys(range(4)), entries, {}, None)
    assert nobody["means"] is None and nobody["average"] is None and nobody["scores"] == {}
