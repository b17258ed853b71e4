"""Placeholders by hand: which masks they get, what may not be rewritten, how an expression fits into the question."""

import pytest

from swim_fast.data.source.errors import DataError
from swim_fast.nl_refer.english.expressions import Expression
from swim_fast.nl_refer.placeholders import find_task, replace_placeholders

MASKS = [{"0": None}, {"1": None}, {"2": None}]


def entry(*turns: str, masks: int = 1, **changes) -> dict:
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"video": "a.mp4", "conversations": conversations, "annotation": MASKS[:masks], "extra": 7, **changes}


BOUND = {
    # question, masks, objects by number, objects by order, objects without placeholder
    "one": ("<object1><region>", 1, [0], [0], 0),
    "bare": ("<region>", 1, [0], [0], 0),
    "without region": ("<object1>", 1, [0], [0], 0),
    "spaced": ("<object1> <region>", 1, [0], [0], 0),
    "no number": ("<object><region>", 1, [0], [0], 0),
    "from zero": ("<object0><region> and <object1><region>", 2, [0, 1], [0, 1], 0),
    "from one": ("<object1><region> and <object2><region>", 2, [0, 1], [0, 1], 0),
    "out of order": ("<object2><region> and <object1><region>", 2, [1, 0], [0, 1], 0),
    "named twice": ("<object1><region> or <object2><region>: is <object1> red?", 2, [0, 1, 0], [0, 1, 0], 0),
    "other numbers": ("<object7><region> and <object3><region>", 2, [1, 0], [0, 1], 0),
    "lone high number": ("<object4><region>", 1, [0], [0], 0),
    "only the second": ("<object2><region>", 3, [1], [0], 2),
    "only the third, from zero": ("<object0><region> <object2><region>", 3, [0, 2], [0, 1], 1),
    "two bare": ("<region> and <region>", 2, [0, 1], [0, 1], 0),
    "bare beside a number": ("<region> and <object1><region>", 2, [1, 0], [0, 1], 0),
    "bare and numbers": ("<object1> <region> <object3><region>", 3, [0, 2], [0, 1], 1),
    "bare twice beside a number": ("<object1>, <region>, <object3><region>", 3, [0, 1, 2], [0, 1, 2], 0),
}


@pytest.mark.parametrize("case", BOUND)
def test_masks_by_number_and_by_order(case):
    question, masks, by_number, by_order, unnamed = BOUND[case]
    raw = entry(f"<video>\n{question}", "x", masks=masks)
    task = find_task(raw, 3, "number")
    assert [place.object for place in task.placeholders] == by_number
    assert (task.index, task.unnamed, task.contested) == (3, unnamed, by_number != by_order)
    assert [place.object for place in find_task(raw, 3, "order").placeholders] == by_order


PROBLEMS = {
    "more placeholders than masks": (entry("<region> and <region>", "x"), "cannot be bound to 1 annotations"),
    "number too high": (entry("<object1><region> <object4><region>", "x", masks=3), "cannot be bound to 3 annotations"),
    "no masks": (entry("<object1><region>", "x", annotation=None), "cannot be bound to 0 annotations"),
    "in the answer": (entry("What?", "It is <object1>."), "stands in an answer"),
    "tags beside": (entry("<region> and the <ins>dog</ins>", "x", masks=2), "both <ins> tags and placeholders"),
    "no conversation": ({"annotation": []}, "is missing or empty"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_cannot_be_rewritten(case):
    raw, reason = PROBLEMS[case]
    with pytest.raises(DataError, match=reason):
        find_task(raw, 0)


def test_nothing_to_rewrite():
    assert find_task(entry("Where is the <ins>dog</ins>?", "There."), 0) is None


FITTED = {
    "Describe <object1><region> in it.": "Describe the red <ins>car</ins> in it.",
    "Describe the <region>.": "Describe the red <ins>car</ins>.",
    "Is this <region> red?": "Is this red <ins>car</ins> red?",
    "<video>\n<region> moves where?": "<video>\nThe red <ins>car</ins> moves where?",
    "Look. <region>'s colour?": "Look. The red <ins>car</ins>'s colour?",
    "Describe<region>in it": "Describe the red <ins>car</ins> in it",
    "Is it (<region>)?": "Is it (the red <ins>car</ins>)?",
}


@pytest.mark.parametrize("question", FITTED)
def test_an_expression_fits_into_the_question(question):
    raw = entry(question, "The red car.")
    result = replace_placeholders(raw, find_task(raw, 0), [Expression("The red car", "car")])
    assert result["conversations"][0]["value"] == FITTED[question]


def test_conversations_of_several_turns_and_objects():
    raw = entry(
        "<video>\nWho chases <object2><region>?",
        "The man does.",
        "And does <object1><region> like <object2>?",
        "No.",
        masks=3,
    )
    names = [
        Expression("one of the dogs", "dogs"),
        Expression("a man in a dog-like coat", "man"),
        Expression("dogs", "dogs"),
    ]
    result = replace_placeholders(raw, find_task(raw, 0), names)
    assert [turn["value"] for turn in result["conversations"]] == [
        "<video>\nWho chases one of the <ins>dogs</ins>?",
        "The man does.",
        "And does a <ins>man</ins> in a dog-like coat like <ins>dogs</ins>?",
        "No.",
    ]
    assert result["annotation"] == [MASKS[1], MASKS[0], MASKS[1]] and result["extra"] == 7
    assert raw["annotation"] == MASKS and "<object1>" in raw["conversations"][2]["value"], (
        "the raw record is not touched"
    )
