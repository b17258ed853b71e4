"""The noun that heads a referring expression: "a *dog* running on the grass", "which *ball* is on the rack?".

Unlike the subject of a description, the object may be as generic as it likes ("the *object* that moves"). What the
rules cannot tell they leave alone, since a noun that is tagged wrongly teaches the wrong thing.
"""

from __future__ import annotations

from swim_fast.nl_refer.english.phrases import (
    NOUNS,
    POSITION,
    NounPhrase,
    Token,
    find_noun_phrase,
    find_phrase_with_of,
    possible_tags,
    skip_adverbials,
)

# Heads that say where or in what an object is, or how old it is: "the front most zebra", "a 3 year old boy".
_NO_OBJECT = POSITION | frozenset("left right video clip scene image frame footage picture photo year month".split())
# Nouns that end like a participle.
_THINGS = frozenset(
    "thing something anything ring earring wing king string sling spring building ceiling clothing painting railing "
    "awning duckling gosling sibling pudding icing crossing wedding stocking".split()
)
# Nouns that do something more often than they tell of what kind a thing is.
_BEINGS = frozenset(
    "person man woman boy girl child kid baby toddler lady guy player rider dog puppy cat kitten bird horse cow sheep "
    "goat pig duck elephant zebra giraffe bear panda tiger lion leopard monkey ape rabbit fox deer fish turtle lizard "
    "snake frog mouse parrot owl eagle penguin swan hen rooster".split()
)


def find_referred_phrase(tokens: list[Token]) -> NounPhrase | None:
    """Return the phrase that heads a referring expression, up to its noun; None if that is not clear.

    In a question it is what "which" or "what" asks for. "The man and the woman" names two objects, "one of the dogs"
    less than its noun does: None.
    """
    if not tokens:
        return None
    if tokens[0].tag in ("DTQ", "PNQ", "AVQ") or tokens[0].word in ("which", "what", "who", "where", "how"):
        phrase = find_noun_phrase(tokens, 1) if tokens[0].word in ("which", "what") else None
    else:
        i = skip_adverbials(tokens)
        phrase = None if i is None else find_phrase_with_of(tokens, i)
    phrase = phrase and _before_action(tokens, phrase)
    if phrase is None or tokens[phrase.head].word in _NO_OBJECT or _is_part(tokens, phrase):
        return None
    joined = phrase.end < len(tokens) and (tokens[phrase.end].tag == "CJC" or tokens[phrase.end].text == ",")
    return None if joined and find_noun_phrase(tokens, phrase.end + 1) else phrase


def _before_action(tokens: list[Token], phrase: NounPhrase) -> NounPhrase | None:
    """Return a phrase without what its noun is doing, which the tagger may take for a compound.

    "A fish *swimming*" and "two people *talk*" are cut; "dog *walk*" may be either: None.
    """
    for i in range(phrase.start + 1, phrase.head + 1):
        before, word = tokens[i - 1], tokens[i].word
        if before.tag not in NOUNS:
            continue
        several = before.tag == "NN2" or before.word == "people"
        if word.endswith("ing") and word not in _THINGS:
            return NounPhrase(phrase.start, i - 1, i)
        if (several or before.word in _BEINGS) and possible_tags(word) & {"VVB", "VVI"}:
            return NounPhrase(phrase.start, i - 1, i) if several else None
    return phrase


def _is_part(tokens: list[Token], phrase: NounPhrase) -> bool:
    """Tell if a phrase means less than its noun: "one of the *dogs*", "the back of the *chair*"."""
    before_of = [tokens[i - 1].word for i in range(phrase.start + 1, phrase.head) if tokens[i].tag == "PRF"]
    return any(word == "one" or word in POSITION for word in before_of)
