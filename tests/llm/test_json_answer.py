"""Dicts and lists are found in whatever a model writes around them."""

import pytest

from swim_fast.llm.json_answer import final_text, find_values, walk

FOUND = {
    "json": ('{"a": [1, {"b": null}]}', [{"a": [1, {"b": None}]}]),
    "python": ("{'a': (1, None), 'b': True}", [{"a": (1, None), "b": True}]),
    "fenced": ('Sure [as JSON]:\n```json\n{"a": 1}\n```\nIs {anything} missing?', [{"a": 1}]),
    "several": ("see [1]: {'a': 1}, then {\"b\": 2}", [[1], {"a": 1}, {"b": 2}]),
    "a brace in a text": ("{'a': 'x}'}", [{"a": "x}"}]),
    "inside what is no literal": ("{so: {'a': 1}}", [{"a": 1}]),
    "a set is none": ("I gave {3} of {'a': 1}", [{"a": 1}]),
    "cut off": ('{"a": [1, {"b', []),
    "nothing": ("", []),
}


@pytest.mark.parametrize("case", FOUND)
def test_outermost_values(case):
    text, expected = FOUND[case]
    assert list(find_values(text)) == expected


def test_code_is_never_run():
    assert list(find_values("{'a': __import__('os').getcwd()}")) == []


def test_walk_goes_from_the_whole_to_its_parts():
    value = {"a": [1, {"b": {}}], "c": {}}
    assert list(walk(value)) == [value, [1, {"b": {}}], {"b": {}}, {}, {}]


def test_thoughts_are_left_out():
    assert final_text("<think>{'a': 1}</think> {'a': 2}") == " {'a': 2}"
