"""The noun phrase of the object that a sentence describes: found with part-of-speech tags and a small grammar.

HanTa (Wartena 2019, "A Probabilistic Morphology Model for German Lemmatization") tags words with the C5 tagset of the
British National Corpus: NN1 singular noun, NN2 plural, NN0 either, NP0 name, AJ0 adjective, AT0 article, PRP
preposition, PRF "of", VVZ "runs", VVG "running", VVN "seen", VB* forms of "be".

The object of a sentence is, in this order: what a presenting clause presents ("there is a …", "this is a …", "the video
shows a …", "the object appears to be a …", "on the left stands a …"), else the subject behind leading adverbials. The
head is the last noun of the phrase, except that quantities, kinds and positions stand for what they are of ("a pair of
*shoes*", "the top of a *table*").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from swim_fast.errors import MissingLibraryError

_WORD = re.compile(r"[^\W_]+(?:[-.,'’&/](?!s\b)[^\W_]+)*|['’]s\b|[^\w\s]|_")

# Nouns that say what is shown, not what it is.
GENERIC = frozenset(
    "object subject region item thing area target entity mask video clip scene image frame footage picture photo "
    "segment sequence focus example view shot something anything part one color colour shape size position movement "
    "motion appearance".split()
)
# Nouns of a class so wide that what the sentence says the object is names it better ("this person is a young woman").
_WIDE = frozenset("person individual figure animal creature vehicle".split())
# X of Y: Y is the object …
_QUANTITY = frozenset(
    "group pair bunch piece set number variety herd flock crowd couple slice pack swarm stack pile row line collection "
    "series lot bit majority team family cluster handful dozen array assortment batch strip chunk sheet bundle".split()
)
POSITION = frozenset(
    "top bottom side front back rear edge middle center centre end corner part portion section rest half interior "
    "exterior inside outside surface color colour shape size position movement motion appearance".split()
)
# … and X is dropped from the expression.
_DROPPED = frozenset("type kind sort form view close-up closeup image picture photo shot depiction example".split())

_ARTICLES = frozenset("a an the some this that these those another".split())
_APPEARANCE = frozenset(
    "wearing holding carrying dressed clad covered filled made decorated adorned labeled featuring".split()
)
_PLACES = frozenset("in on at near beside behind under above inside with of from between beneath below".split())
_BETWEEN_SUBJECT_AND_NOUN = frozenset(
    "is 's ’s are was were be been appears appear seems seem to can could may might as like identified described "
    "recognized recognised classified shows show features depicts displays captures showcases presents contains "
    "highlights corresponds refers represents includes looks focuses on".split()
)
_SEEING = frozenset("see observe notice find spot".split())
NOUNS = ("NN0", "NN1", "NN2", "NP0", "NN")
_FINITE = ("VVZ", "VVD", "VVB", "VBZ", "VBD", "VBB", "VM0", "VHZ", "VHD", "VHB", "VDZ", "VDD", "VDB")
_UNKNOWN = ("UNC", "UNKNOWN", "!!!")
_ADJECTIVES = ("AJ0", "AJC", "AJS", "ORD")


@dataclass(frozen=True)
class Token:
    """A word or mark of a sentence: its text, its C5 tag, and its half-open range of characters."""

    text: str
    tag: str
    start: int
    end: int

    @property
    def word(self) -> str:
        return self.text.lower()


@dataclass(frozen=True)
class NounPhrase:
    """Tokens [start, end) of a sentence, and the index of the head noun."""

    start: int
    head: int
    end: int


@lru_cache(maxsize=1)
def _tagger():
    try:
        from HanTa import HanoverTagger
    except ImportError as error:
        message = "the rules need HanTa to tag parts of speech; pip install 'swim-fast[nl-refer]'"
        raise MissingLibraryError(message) from error
    return HanoverTagger.HanoverTagger("morphmodel_en.pgz")


@lru_cache(maxsize=65536)
def possible_tags(word: str) -> frozenset[str]:
    return frozenset(tag for tag, _ in _tagger().tag_word(word, cutoff=10))  # down to exp(-10) of the likeliest


def tag_sentence(sentence: str) -> list[Token]:
    """Split a sentence into words and marks and tag them; readings that English grammar rules out are corrected."""
    found = list(_WORD.finditer(sentence))
    if not found:
        return []
    tagged = _tagger().tag_sent([match.group() for match in found])
    tokens = [
        Token(match.group(), tag, match.start(), match.end()) for match, (_, _, tag) in zip(found, tagged, strict=True)
    ]
    for i, token in enumerate(tokens):
        tag = _corrected_tag(tokens, i)
        if tag != token.tag:
            tokens[i] = Token(token.text, tag, token.start, token.end)
    return tokens


def _corrected_tag(tokens: list[Token], i: int) -> str:
    token, tag = tokens[i], tokens[i].tag
    before = tokens[i - 1].tag if i else ""
    after = tokens[i + 1].tag if i + 1 < len(tokens) else ""
    if token.text.isupper() and len(token.text) > 1 and tag not in NOUNS and before in ("AT0", *_ADJECTIVES):
        return "NP0"  # an SUV
    if tag in ("VVZ", "VVB", "VVI") and before in ("AT0", "DPS", "POS", *_ADJECTIVES):
        return "NN2" if token.word.endswith("s") and "NN2" in possible_tags(token.word) else "NN1"
    if tag == "VVZ" and after in ("VBB", "VHB") and "NN2" in possible_tags(token.word):
        return "NN2"  # the coffee cups are
    if tag in _UNKNOWN and before in ("AT0", "DPS", "POS", "CRD", *_ADJECTIVES) and after not in NOUNS:
        return "NN1"
    # "The dog barks at": what looks like a plural behind a noun may be the verb of a clause that has no other.
    if tag in ("NN2", *_UNKNOWN) and token.word.endswith("s") and before in NOUNS and after not in NOUNS:
        certain = before == "NN2" or after in ("AVP", "AV0", "AT0", "DPS") or tag in _UNKNOWN
        likely = after not in ("", "PUN") and (certain or "VVZ" in possible_tags(token.word))
        if likely or _has_indefinite_article(tokens, i):
            if not any(tag in _FINITE for tag in _tags_of_clause(tokens, i + 1)):
                return "VVZ"
    return tag


def _has_indefinite_article(tokens: list[Token], i: int) -> bool:
    """Tell if the nouns before token `i` begin with "a", which no plural can have."""
    while i and tokens[i - 1].tag in (*NOUNS, *_ADJECTIVES, "VVN", "VVG"):
        i -= 1
    return i > 0 and tokens[i - 1].word in ("a", "an")


def _tags_of_clause(tokens: list[Token], i: int) -> list[str]:
    tags = []
    for token in tokens[i:]:
        if token.tag in ("CJC", "CJS", "CJT", "PNQ", "DTQ") or token.text in ",;:.!?":
            break
        tags.append(token.tag)
    return tags


def find_noun_phrase(tokens: list[Token], i: int) -> NounPhrase | None:
    """Return the noun phrase that begins with token `i`, without what follows its last noun; None if none does."""
    start, head = i, None
    has_determiner = False
    while i < len(tokens):
        token = tokens[i]
        after = tokens[i + 1].tag if i + 1 < len(tokens) else ""
        if token.tag in ("AT0", "DT0", "DPS"):
            if i > start or after in _FINITE:  # "this is" has no phrase
                break
            has_determiner = True
        elif token.tag in NOUNS:
            head = i
        elif token.tag == "PNI" and after == "POS" and head is None:
            pass  # someone's feet
        elif token.tag == "POS":
            head = None
        elif head is not None:
            break
        elif token.tag in (*_ADJECTIVES, "CRD"):
            pass
        elif token.tag in ("VVN", "VVG", "AV0", "VVD"):
            if not (has_determiner or i > start):
                break
        elif not (token.text == "," or token.tag == "CJC") or not _joins_adjectives(tokens, i):
            break
        i += 1
    if head is None:
        return None
    if tokens[head].word == "number" and head > start and tokens[head - 1].tag in NOUNS:
        return NounPhrase(start, head - 1, min(head + 2, len(tokens)))  # player number 10
    return NounPhrase(start, head, head + 1)


def _joins_adjectives(tokens: list[Token], i: int) -> bool:
    describing = (*_ADJECTIVES, "VVN", "VVG")
    followers = [token.tag for token in tokens[i + 1 : i + 3]]
    colours = tokens[i - 1].tag in describing if i else False
    return colours and bool(followers) and (followers[0] in describing or followers[0] == "AV0")


def follow_of(tokens: list[Token], phrase: NounPhrase) -> NounPhrase:
    """Follow "of" from quantities, positions, kinds and views to what they are of."""
    while phrase.end < len(tokens) and tokens[phrase.end].tag == "PRF":
        word = tokens[phrase.head].word
        word = word[:-1] if word.endswith("s") else word
        inner = find_noun_phrase(tokens, phrase.end + 1)
        if inner is None or word not in _QUANTITY | POSITION | _DROPPED:
            break
        phrase = inner if word in _DROPPED else NounPhrase(phrase.start, inner.head, inner.end)
    return phrase


def find_described_phrase(tokens: list[Token], *, subjects: bool = True) -> NounPhrase | None:
    """Return the phrase of the object that a sentence describes; None if the sentence does not name it.

    Args:
        tokens: one sentence, see `tag_sentence`.
        subjects: False: only what a sentence says about a subject that means the object itself ("it is a …", "the
            object appears to be a …"), as behind a first sentence that left the object unnamed.
    """
    i = skip_adverbials(tokens)
    if i is None or i >= len(tokens):
        return None
    word, tag = tokens[i].word, tokens[i].tag
    if word in ("there", "what") or tag == "EX0":
        return _find_named(tokens, _skip_linking(tokens, i + 1)) if subjects else None
    if word in ("we", "you", "one", "i") and tag in ("PNP", "PNI"):
        seeing = next((j for j in range(i + 1, min(i + 4, len(tokens))) if tokens[j].word in _SEEING), None)
        return None if seeing is None or not subjects else _find_named(tokens, seeing + 1)
    if tag in ("PNP", "DT0") and (i + 1 == len(tokens) or tokens[i + 1].tag in (*_FINITE, "AV0")):
        return _find_complement(tokens, i + 1)
    phrase = find_phrase_with_of(tokens, i)
    if phrase is None or tag == "DPS":  # "its colour", "her hair": of an object that is not named here
        return None
    shown = tokens[phrase.head].word in POSITION and _text_at(tokens, phrase.end) in ("shows", "displays", "contains")
    if tokens[phrase.head].word not in GENERIC | _WIDE and not shown:
        return phrase if subjects else None
    if _text_at(tokens, phrase.end) == ",":
        apposition = _find_named(tokens, phrase.end + 1)
        if apposition is not None and tokens[apposition.start].word in _ARTICLES:
            return apposition
    if tokens[phrase.head].word in _WIDE:
        better = _find_complement(tokens, phrase.end)
        return better or (phrase if subjects else None)
    verb = next((j for j in range(phrase.end, len(tokens)) if _links(tokens[j])), None)
    return None if verb is None else _find_complement(tokens, verb)


def _text_at(tokens: list[Token], i: int) -> str:
    return tokens[i].text if i < len(tokens) else ""


def find_phrase_with_of(tokens: list[Token], i: int) -> NounPhrase | None:
    """Return the phrase at token `i`, followed through "of": "two of the *players*", "a pair of *shoes*"."""
    if i + 1 < len(tokens) and tokens[i].tag in ("CRD", "DT0", "PNI") and tokens[i + 1].tag == "PRF":
        inner = find_noun_phrase(tokens, i + 2)
        return inner and NounPhrase(i, inner.head, inner.end)
    phrase = find_noun_phrase(tokens, i)
    return phrase and follow_of(tokens, phrase)


def _links(token: Token) -> bool:
    return token.tag in _FINITE and (token.word in _BETWEEN_SUBJECT_AND_NOUN or token.tag == "VM0")


def _skip_linking(tokens: list[Token], i: int) -> int:
    while i < len(tokens) and (tokens[i].word in _BETWEEN_SUBJECT_AND_NOUN or tokens[i].tag == "AV0"):
        i += 1
    return i


def _find_complement(tokens: list[Token], verb: int) -> NounPhrase | None:
    """Return what the subject is said to be, if that is clearly a thing and no property ("it is light")."""
    while verb < len(tokens) and tokens[verb].tag == "AV0":
        verb += 1
    if verb == len(tokens) or not _links(tokens[verb]):
        return None
    i = _skip_linking(tokens, verb)
    phrase = _find_named(tokens, i)
    if phrase is None:
        return None
    certain = tokens[i].tag in ("AT0", "DPS", "CRD", "DT0") or tokens[phrase.head].tag in ("NN2", "NN0")
    return phrase if certain else None


def _find_named(tokens: list[Token], i: int) -> NounPhrase | None:
    phrase = find_phrase_with_of(tokens, i)
    return None if phrase is None or tokens[phrase.head].word in GENERIC else phrase


def skip_adverbials(tokens: list[Token]) -> int | None:
    """Return the index of the token that begins the clause behind "in the video,", "initially," or "wearing a hat,".

    If the object stands behind its verb ("in the background stands a tower"), it is the token behind the verb.
    """
    i = 0
    while i < len(tokens):
        tag = tokens[i].tag
        if tag in ("AV0", "ITJ", "CJC") or tokens[i].text == "," or (tag == "ORD" and _comma_follows(tokens, i)):
            i += 1
        elif tag in ("PRP", "AVP"):
            end = _skip_places(tokens, i)
            if end < len(tokens) and tokens[end].tag in _FINITE:
                return _skip_linking(tokens, end + 1)  # in the background stands a tower
            i = end + 1 if end < len(tokens) and tokens[end].text == "," else _skip_comma(tokens, i)
        elif tag in ("CJS", "VVG", "VVN") or (tag == "AJ0" and i + 1 < len(tokens) and tokens[i + 1].tag == "PRP"):
            comma = _skip_comma(tokens, i)
            if comma is None and tag != "CJS":  # standing on the left is a man; visible behind him is a tree
                be = next((j for j in range(i, len(tokens)) if tokens[j].tag in ("VBZ", "VBB", "VBD")), None)
                return None if be is None else _skip_linking(tokens, be)
            i = comma
        else:
            return i
        if i is None:
            return None
    return None


def _comma_follows(tokens: list[Token], i: int) -> bool:
    return i + 1 < len(tokens) and tokens[i + 1].text == ","


def _skip_places(tokens: list[Token], i: int) -> int:
    while i < len(tokens) and tokens[i].tag in ("PRP", "PRF", "AVP"):
        i += 1
        if i < len(tokens) and tokens[i].tag in ("PRP", "PRF", "AVP"):
            continue
        phrase = find_noun_phrase(tokens, i)
        if phrase is None:
            break
        i = phrase.end
    return i


def _skip_comma(tokens: list[Token], i: int) -> int | None:
    """Return the index of the token behind the first comma after which a clause may begin."""
    begins = ("AT0", "DT0", "DPS", "CRD", "NP0", "NN0", "NN2", "PNP", "EX0")
    for j in range(i, len(tokens) - 1):
        if tokens[j].text == "," and (tokens[j + 1].tag in begins or tokens[j + 1].word == "there"):
            return j + 1
    return None


def find_modifier_end(tokens: list[Token], phrase: NounPhrase) -> int:
    """Return the end of the phrase with the one modifier that follows it, if that tells the object from others.

    Such modifiers are places and possessions ("with a red collar", "on the left") and appearance ("wearing a black
    jacket"), not what happens: a question must not give the answer away.
    """
    i = phrase.end
    if i >= len(tokens):
        return phrase.end
    if tokens[i].tag in ("PRP", "PRF") and tokens[i].word in _PLACES:
        i += 1
    elif tokens[i].tag in ("VVG", "VVN", "AJ0") and tokens[i].word in _APPEARANCE:
        i += 1
        if i < len(tokens) and tokens[i].tag in ("PRP", "PRF"):
            i += 1
    else:
        return phrase.end
    inner = find_noun_phrase(tokens, i)
    if inner is None:
        # in black
        colour = i < len(tokens) and tokens[i].tag == "AJ0" and tokens[i - 1].word in ("in", "wearing")
        return i + 1 if colour else phrase.end
    if tokens[inner.head].word in GENERIC:
        return phrase.end
    end = inner.end
    while end < len(tokens) and tokens[end].tag == "PRF" and (more := find_noun_phrase(tokens, end + 1)) is not None:
        end = more.end
    # "the leaves of the plant move": in a sentence without a verb, the last of two nouns may be the verb.
    if (tokens[end - 2].tag in NOUNS or tokens[end - 2].word in ("left", "right")) and not any(
        token.tag in _FINITE for token in tokens
    ):
        end -= tokens[end - 1].tag == "NN2" or bool(possible_tags(tokens[end - 1].word) & {"VVB", "VVI"})
    return phrase.end if tokens[end - 1].word in GENERIC | {"background", "foreground", "camera"} else end
