"""What a model may answer and what not, by hand."""

import json

import pytest

from swim_fast.nl_refer.asking import UnnamedError, messages, read_answer
from swim_fast.nl_refer.english.expressions import Expression
from swim_fast.nl_refer.placeholders import find_task
from swim_fast.nl_refer.validation import RejectedError, check_expressions
from tests.nl_refer.test_placeholders import entry

ANSWER = "The brown dog with a red collar runs across the wet grass after two kids."
ONE = find_task(entry("<video>\nDescribe <region>.", ANSWER), 0)
PAIR = entry("Is <object1><region> behind <object2><region>? Is <object1> red?", "A dog behind a tall cat.", masks=2)
PAIR = find_task(PAIR, 0)


def test_good_expressions():
    for text, noun in [
        ("the brown dog with a red collar", "dog"),
        ("the Dog", "dog"),
        ("two kids", "kids"),
        ("one kid's dog", "kid"),
        ("the dog, brown", "dog"),
    ]:
        check_expressions(ONE, [Expression(text, noun)])
    check_expressions(
        PAIR, [Expression("the dog", "dog"), Expression("the tall cat", "cat"), Expression("the dog", "dog")]
    )
    short = find_task(entry("What is <region>?", "A red car."), 0)
    check_expressions(short, [Expression("a red car", "car")])


BAD = {
    "empty": ("", "dog", "it is empty"),
    "a sentence": ("the dog runs.", "dog", "a sentence's end"),
    "a tag": ("the <b>dog</b>", "dog", "markup"),
    "a placeholder left": ("the dog {1}", "dog", "markup"),
    "two lines": ("the\ndog", "dog", "markup, a line break"),
    "spaces around": (" the dog", "dog", "markup"),
    "too long": ("the dog " + "very " * 15, "dog", "markup"),
    "too many words": ("the " + "very " * 14 + "brown dog", "dog", "it has 17 words; 15 are allowed"),
    "noun of two words": ("the brown dog", "brown dog", "not exactly one word"),
    "no noun": ("the brown dog", "", "not exactly one word"),
    "noun elsewhere": ("the brown one", "dog", "is not a word of it"),
    "part of a word": ("the brown dogfish", "dog", "is not a word of it"),
    "part of a hyphened word": ("the dog-like thing", "dog", "is not a word of it"),
    "pronoun": ("it", "it", "does not say what the object is"),
    "generic": ("the object", "object", "does not say what the object is"),
    "invented": ("the unicorn", "unicorn", "does not occur in the conversation"),
    "the answer copied": (ANSWER[:-1], "dog", "it copies the answer"),
    "nearly all of the answer": ("the brown dog with a red collar runs across the wet grass", "dog", "copies"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_expressions(case):
    text, noun, reason = BAD[case]
    if case == "nearly all of the answer":
        task = find_task(entry("Describe <region>.", "The brown dog with a red collar runs across the wet grass."), 0)
    else:
        task = ONE
    with pytest.raises(RejectedError, match=reason):
        check_expressions(task, [Expression(text, noun)])


def test_expressions_are_held_against_each_other():
    dog, cat = Expression("the dog", "dog"), Expression("the tall cat", "cat")
    with pytest.raises(RejectedError, match="there are 3 placeholders but 2 expressions"):
        check_expressions(PAIR, [dog, cat])
    with pytest.raises(RejectedError, match="two different objects are both called 'The dog'"):
        check_expressions(PAIR, [dog, Expression("The dog", "dog"), dog])
    with pytest.raises(RejectedError, match="one object is named by two nouns, 'dog' and 'cat'"):
        check_expressions(PAIR, [dog, cat, cat])
    with pytest.raises(RejectedError, match="expression 2, 'the horse': the noun 'horse'"):
        check_expressions(PAIR, [dog, Expression("the horse", "horse"), dog])


ITEM = {"placeholder": 1, "expression": "the dog", "noun": "dog"}
DOG = [Expression("the dog", "dog")]
READ = {
    "as wanted": json.dumps({"expressions": [ITEM]}),
    "pretty": json.dumps({"expressions": [ITEM]}, indent=2),
    "fenced": f"```json\n{json.dumps({'expressions': [ITEM]})}\n```",
    "prose around": f"Here {{you}} are [1]: {json.dumps({'expressions': [ITEM]})} I hope {{that}} helps.",
    "a bare list": json.dumps([ITEM]),
    "thought aloud": f'<think>{{"expressions": [{{"expression": "x"}}]}}</think>{json.dumps({"expressions": [ITEM]})}',
    "no numbers": '{"expressions": [{"expression": "the dog", "noun": "dog"}]}',
    "tagged": '{"expressions": [{"expression": "the <ins>dog</ins>", "noun": "<ins>dog</ins>"}]}',
    "quoted": '{"expressions": [{"expression": "\\"the  dog.\\"", "noun": "dog."}]}',
}


@pytest.mark.parametrize("case", READ)
def test_answers_that_can_be_read(case):
    assert read_answer(READ[case], ONE) == DOG


UNREADABLE = {
    "nothing": ("", "no JSON object"),
    "prose": ("the dog", "no JSON object"),
    "cut off": ('{"expressions": [{"placeholder": 1, "expr', "no JSON object"),
    "another object": ('{"expression": "the dog"}', "no JSON object"),
    "a string": ('{"expressions": "the dog"}', "is not a list of objects"),
    "a list of strings": ('{"expressions": ["the dog"]}', "is not a list of objects"),
    "no noun": ('{"expressions": [{"expression": "the dog"}]}', 'lacks "expression" or "noun"'),
    "noun of another type": ('{"expressions": [{"expression": "the dog", "noun": 3}]}', "lacks"),
    "wrong number": (
        '{"expressions": [{"placeholder": 2, "expression": "the dog", "noun": "dog"}]}',
        r"numbers are \[2\]",
    ),
    "a number twice": (json.dumps({"expressions": [ITEM, ITEM]}), r"numbers are \[1, 1\]; each of \[1\]"),
    "a number as text": (json.dumps({"expressions": [{**ITEM, "placeholder": "1"}]}), "numbers are"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_answers_that_cannot_be_read(case):
    answer, reason = UNREADABLE[case]
    with pytest.raises(RejectedError, match=reason) as caught:
        read_answer(answer, ONE)
    assert not isinstance(caught.value, UnnamedError)


def test_numbers_say_which_placeholder_is_meant():
    items = [
        {"placeholder": n, "expression": f"the {noun}", "noun": noun} for n, noun in ((3, "c"), (1, "a"), (2, "b"))
    ]
    assert [expression.noun for expression in read_answer(json.dumps({"expressions": items}), PAIR)] == ["a", "b", "c"]


def test_the_model_may_say_that_there_is_no_name():
    with pytest.raises(UnnamedError, match="the answers do not name the object: only pronouns"):
        read_answer('{"expressions": null, "reason": "only pronouns"}', ONE)


def test_the_prompt_numbers_the_placeholders_and_hides_no_text():
    system, user = messages(PAIR, 9)
    assert "At most 9 words" in system["content"] and '{"expressions": [{"placeholder": 1' in system["content"]
    assert user["content"].splitlines() == [
        "Question: Is {1} behind {2}? Is {3} red?",
        "Answer: A dog behind a tall cat.",
        "({1} and {3} are the same object.)",
    ]
