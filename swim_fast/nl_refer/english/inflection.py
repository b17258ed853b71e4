"""English nouns: their plural, and the article before them. Enough for the words of everyday objects."""

from __future__ import annotations

import re

_IRREGULAR = {
    "person": "people",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "ox": "oxen",
    "human": "humans",
    "stomach": "stomachs",
    "monarch": "monarchs",
    "loaf": "loaves",
    "leaf": "leaves",
    "calf": "calves",
    "half": "halves",
    "shelf": "shelves",
    "elf": "elves",
    "wolf": "wolves",
    "scarf": "scarves",
    "thief": "thieves",
    "knife": "knives",
    "wife": "wives",
    "life": "lives",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "hero": "heroes",
    "mango": "mangoes",
    "cactus": "cacti",
}
_COMPOUNDING = ("person", "child", "foot", "tooth", "wife", "wolf")  # sportspeople, grandchildren
_UNCHANGING = frozenset(
    "sheep deer swine waterfowl fish aircraft cattle bison moose squid salmon spacecraft hovercraft".split()
)
_PLURAL_ONLY = frozenset(
    "pants trousers jeans denims scissors shears glasses spectacles eyeglasses sunglasses shades shorts pajamas "
    "clothes stairs steps woods".split()
)


def pluralize(noun: str) -> str:
    """Return the plural of a singular noun; a word that has only a plural is returned as it is."""
    word = noun.lower()
    if word in _UNCHANGING | _PLURAL_ONLY:
        return noun
    ending = next((ending for ending in _COMPOUNDING if word.endswith(ending)), word)
    if ending in _IRREGULAR:
        return noun[: len(noun) - len(ending)] + _IRREGULAR[ending]
    if word.endswith("man"):
        return noun[:-3] + "men"
    if re.search(r"[^aeiou]y$", word):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")


def takes_an(word: str) -> bool:
    """Tell if the indefinite article before a word is "an"."""
    if len(word) > 1 and word.isupper():  # spelt out: an SUV, a TV
        return word[0] in "AEFHILMNORSX"
    word = word.lower()
    if re.match(r"hour|honest|honou?r|heir", word):
        return True
    return word[:1] in set("aeiou") and not re.match(r"uni(?!m|n)|us[aeu]|uti|eu|one(?!i)|once", word)
