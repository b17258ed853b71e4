"""From the turns of a record to the text that the model reads, with the span of every noun and every answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, Turn
from swim_fast.data.source.tags import strip_tags
from swim_fast.errors import OptionError, ProcessorError

Span = tuple[int, int]

# LLaVA-style files write <image> also where the record names a video. White space is tried from its beginning alone,
# or a long stretch of it would take quadratic time.
PLACEHOLDER = re.compile(r"(?:(?<!\s)\s+)?<(?:video|image)>\s*")
# Answers at either end of a conversation before which the template is tried out; each costs as much as the whole.
ANSWERS_TRIED = 8
# Private-use characters stand in for the turns' texts while the template's own text is being found out.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class Conversation:
    """A conversation as the chat template renders it; spans are half-open ranges of characters of `text`.

    Attributes:
        text: rendered by the template, the video or image as one placeholder token that is not yet expanded.
        nouns: span of each tagged noun, in the order of the tags.
        answers: span of each assistant turn: its text, white space before it that the prompt does not end with, and the
            special token that ends the turn.
        labels: spans that are trained on: the answers, with their headers if these are labelled too.
        media: span of the placeholder token; None in a conversation without video or image.
        questions: span of each text of a user's turn.
    """

    text: str
    nouns: tuple[Span, ...]
    answers: tuple[Span, ...]
    labels: tuple[Span, ...]
    media: Span | None
    questions: tuple[Span, ...] = ()


@dataclass(frozen=True)
class _Part:
    """A stretch of a turn: text and the nouns in it, or (None) the video or image."""

    text: str | None
    nouns: tuple[Span, ...] = ()


_MEDIA = _Part(None)


class ConversationRenderer:
    """Renders records with the chat template of a processor; picklable if the processor is.

    The template's own text is found by rendering the conversation once with stand-ins for the turns' texts, so nothing
    is searched for: a noun or an answer that occurs twice, or in the template itself, is never mistaken.

    Args:
        processor: a processor with a chat template, `tokenizer`, `image_token` and `video_token`.
        system_prompt: text of the system turn of records that have none of their own, "" for no such turn; None: what
            the chat template puts there.
        label_header: also train on the header that the template writes before each answer.

    Raises:
        ProcessorError: the processor has no chat template or one that cannot be trained with, see `__call__`; one that
            does not show the system prompt, or whose system turn cannot be left out; one without header to label.
        OptionError: a special token in the system prompt.

    Attributes:
        special_tokens: pattern that finds the special tokens of the tokenizer.
        gap: white space between a prompt and its answer, with which the answer begins; "" with most templates.
    """

    def __init__(self, processor: Any, system_prompt: str | None = None, label_header: bool = False):
        self.processor = processor
        self._system_prompt, self._left_out, self._header = system_prompt, "", ""
        special = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
        special |= {getattr(processor, name) for name in ("image_token", "video_token") if hasattr(processor, name)}
        self.special_tokens = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        if special := self.special_tokens.search(system_prompt or ""):
            raise OptionError(f"system_prompt holds {special.group()!r}, a special token of this model; remove it")
        # A template that fits no record is the processor's fault: say so before the first record is blamed.
        probe = Record("", 0, "", (Turn("user", "a"), Turn("assistant", "b")) * 2, "text", None, ())
        try:
            if system_prompt == "":
                self._left_out = self._default_system_turn()
            found = self(probe)
            answer = found.text[slice(*found.answers[0])]
            self.gap = answer[: len(answer) - len(answer.lstrip())]
            if label_header:
                self._header = self._assistant_header()
        except DataError as error:
            raise ProcessorError(f"this processor cannot be used for training: {error.reason}") from error
        if system_prompt and system_prompt not in found.text:
            raise ProcessorError(
                "the chat template does not show system_prompt as it is (no system turn, or white space at its ends is "
                "dropped); change it or leave it out"
            )

    def __call__(self, record: Record) -> Conversation:
        """Render one record.

        The `<video>` or `<image>` placeholder of a user turn says where the video or image goes; white space next to
        it is dropped. Without a placeholder it goes before the first user turn's text.

        Raises:
            DataError: bad tags, several placeholders, a placeholder in a record without video or image, a special
                token written out in a turn, a conversation that begins with an answer, and a template that changes the
                text of a turn, that does not end the assistant's turns with a special token, or that renders the
                beginning of a conversation differently once it goes on.
        """
        turns: list[list[_Part]] = []
        shown = False
        for number, turn in enumerate(record.turns):
            try:
                parts = self._parts(turn, record.media is not None)
                if _MEDIA in parts and shown:
                    raise DataError("a second <video> or <image> placeholder; a record has one video or image")
            except DataError as error:
                raise error.within(key=f"conversations[{number}]") from error
            shown |= _MEDIA in parts
            turns.append(parts)
        roles = [turn.role for turn in record.turns]
        if record.media is not None and not shown:
            if "user" not in roles:
                raise DataError("no user turn in which the video or image could be shown", key="conversations")
            turns[roles.index("user")].insert(0, _MEDIA)
        return self._render(roles, turns, record.kind)

    def _default_system_turn(self) -> str:
        """Return the text that the chat template puts before the first turn of a conversation without system turn."""
        system, user = [_Part("a")], [_Part("b")]
        alone, followed = (self._apply(["system", "user"][:n], [system, user][:n], "text") for n in (1, 2))
        first, plain = followed.removeprefix(alone), self._apply(["user"], [user], "text")
        before = plain.removesuffix(first)
        bos = self.processor.tokenizer.bos_token
        if len(first) == len(followed) or len(before) == len(plain) or (bos and before.startswith(bos)):
            raise ProcessorError(
                "system_prompt is '', but the system turn cannot be told from the rest of the chat template; give a "
                "text, or leave it out for the template's own"
            )
        return before

    def _assistant_header(self) -> str:
        """Return the text that the chat template puts before an answer."""
        question = ["user"], [[_Part("a")]], "text"
        before, prompt = self._apply(*question), self._apply(*question, add_generation_prompt=True)
        if not prompt.startswith(before) or prompt == before:
            raise ProcessorError("label_header is on, but the chat template writes no header before an answer")
        return prompt[len(before) :]

    def _parts(self, turn: Turn, has_media: bool) -> list[_Part]:
        text, nouns = strip_tags(turn.text)
        # some families' own tokens are written as the placeholder is
        if special := self.special_tokens.search(PLACEHOLDER.sub("", text) if turn.role == "user" else text):
            raise DataError(
                f"the text holds {special.group()!r}, a special token of this model, which would break the "
                "conversation apart; remove or rewrite it"
            )
        placeholders = list(PLACEHOLDER.finditer(text)) if turn.role == "user" else []
        if not placeholders:
            return [_Part(text, tuple(nouns))]
        placeholder, name = placeholders[0], placeholders[0].group().strip()
        if not has_media:
            raise DataError(f"the text holds {name} but the record names no video or image; add it or remove {name}")
        if len(placeholders) > 1:
            raise DataError("more than one <video> or <image> placeholder; a record has one video or image")
        start, end = placeholder.span()
        before = tuple(noun for noun in nouns if noun[1] <= start)
        after = tuple((noun[0] - end, noun[1] - end) for noun in nouns if noun[0] >= end)
        if len(before) + len(after) < len(nouns):
            raise DataError(f"{name} inside an <ins> tag; move it out")
        parts = [_Part(text[:start], before), _MEDIA, _Part(text[end:], after)]
        return [part for part in parts if part.text != ""]

    def _render(self, roles: Sequence[str], turns: Sequence[Sequence[_Part]], kind: str) -> Conversation:
        stand_ins: list[list[_Part]] = []
        texts: list[tuple[int, _Part]] = []  # turn number and text, for each stand-in
        for number, parts in enumerate(turns):
            stand_ins.append([])
            for part in parts:
                if part.text is None:
                    stand_ins[-1].append(part)
                else:
                    stand_ins[-1].append(_Part(f"\ue000{len(texts)}\ue001"))
                    texts.append((number, part))
        skeleton = self._apply(roles, stand_ins, kind)
        template = _STAND_IN.split(skeleton)
        if template[1::2] != [str(number) for number in range(len(texts))]:
            raise DataError("the chat template leaves out, repeats or reorders turns", key="conversations")

        answering = [number for number, role in enumerate(roles) if role == "assistant"]
        tried = {*answering[:ANSWERS_TRIED], *answering[-ANSWERS_TRIED:]}
        rendered, length, gap = [template[0]], len(template[0]), ""
        nouns: list[Span] = []
        answers: list[Span] = []
        labels: list[Span] = []
        questions: list[Span] = []
        for (number, part), before, following in zip(texts, template[:-1:2], template[2::2], strict=True):
            end = length + len(part.text)
            nouns += [(length + first, length + last) for first, last in part.nouns]
            if roles[number] == "assistant":
                if number in tried:
                    gap = self._check_beginning(skeleton, roles, stand_ins, number, kind)
                end_of_turn = self.special_tokens.match(following)
                if not end_of_turn:
                    raise DataError(
                        f"the chat template ends an assistant turn with {following[:20]!r}, which is no special token: "
                        "the model would never learn to stop",
                        key=f"conversations[{number}]",
                    )
                if not before.endswith(self._header + gap):
                    raise DataError(
                        f"the chat template begins this answer with {before[-30:]!r} instead of the header "
                        f"{self._header!r}, which label_header would train on",
                        key=f"conversations[{number}]",
                    )
                start = length - len(gap)
                answers.append((start, end + end_of_turn.end()))
                labels.append((start - len(self._header), end + end_of_turn.end()))
            if roles[number] == "user":
                questions.append((length, end))
            rendered += [part.text, following]
            length = end + len(following)
        text = "".join(rendered)
        if text != self._apply(roles, turns, kind):
            raise DataError(
                "the chat template changes the text of a turn (white space at its ends, perhaps), "
                "so that nouns and answers cannot be located; change the text or the template",
                key="conversations",
            )
        media = self._media_span(text, kind)
        return Conversation(text, tuple(nouns), tuple(answers), tuple(labels), media, tuple(questions))

    def _check_beginning(
        self, skeleton: str, roles: Sequence[str], turns: Sequence[Sequence[_Part]], number: int, kind: str
    ) -> str:
        """Check that what the model is given at inference, the turns before its answer, is what it is trained on.

        Returns:
            The white space between that and the answer, which the model has to write itself.
        """
        if number == 0:
            raise DataError("the conversation begins with an answer; put a user turn first", key="conversations")
        prompt = self._apply(roles[:number], turns[:number], kind, add_generation_prompt=True)
        gap = skeleton[len(prompt) : skeleton.index(turns[number][0].text)]
        if not skeleton.startswith(prompt) or gap.strip():
            raise DataError(
                "the chat template renders the turns before an answer differently once the answer follows, "
                "so training would not match generation",
                key=f"conversations[{number}]",
            )
        return gap

    def _media_span(self, text: str, kind: str) -> Span | None:
        if kind == "text":
            return None
        token = getattr(self.processor, f"{kind}_token", None)
        if token is None:
            raise DataError(f"this model takes no {kind}", key=kind)
        if text.count(token) != 1:
            raise DataError(f"the chat template renders one {kind} as {text.count(token)} × {token!r} instead of one")
        start = text.index(token)
        return start, start + len(token)

    def _apply(
        self,
        roles: Sequence[str],
        turns: Sequence[Sequence[_Part]],
        kind: str,
        add_generation_prompt: bool = False,
    ) -> str:
        from jinja2 import TemplateError

        own = roles[0] == "system"
        if self._system_prompt and not own:
            roles, turns = ["system", *roles], [[_Part(self._system_prompt)], *turns]
        messages = [
            {
                "role": role,
                "content": [
                    {"type": kind} if part.text is None else {"type": "text", "text": part.text} for part in parts
                ],
            }
            for role, parts in zip(roles, turns, strict=True)
        ]
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        except (TemplateError, ValueError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}", key="conversations") from error
        if own or text.startswith(self._left_out):
            return text if own else text[len(self._left_out) :]
        raise DataError("the chat template's system turn changes with the conversation and cannot be left out")
