import dataclasses
import pickle
import time
from pathlib import Path

import pytest

from swim_fast.data.sample.conversation import ConversationRenderer
from swim_fast.data.source.errors import DataError
from swim_fast.errors import OptionError, ProcessorError

VIDEO = {"kind": "video", "media": Path("clip.mp4")}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def render(processor):
    return ConversationRenderer(processor)


def texts(conversation, spans):
    return [conversation.text[start:end] for start, end in spans]


def test_several_turns_with_tags_in_question_and_answer(render, make_record):
    conversation = render(
        make_record(
            "<video>\nIs the <ins>user</ins> a user?",
            "user",
            "And <ins> the dog </ins>",
            "dog: <ins>dog</ins>",
            **VIDEO,
        )
    )
    assert conversation.text == (
        SYSTEM + "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Is the user a user?<|im_end|>\n"
        "<|im_start|>assistant\nuser<|im_end|>\n<|im_start|>user\nAnd  the dog <|im_end|>\n"
        "<|im_start|>assistant\ndog: dog<|im_end|>\n"
    )
    assert texts(conversation, conversation.nouns) == ["user", "the dog", "dog"]
    assert texts(conversation, conversation.answers) == ["user<|im_end|>", "dog: dog<|im_end|>"]
    assert texts(conversation, [conversation.media]) == ["<|video_pad|>"]
    # "user" also stands in the template and in the answer: the tag counts, not the word.
    assert conversation.nouns[0][0] == conversation.text.index("Is the user") + len("Is the ")
    assert conversation.nouns[2][0] == conversation.text.index("dog: dog") + len("dog: ")


def test_the_answer_starts_where_generation_would(render, make_record, processor):
    question = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    conversation = render(make_record("What?", "This.", **VIDEO))
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert conversation.text.startswith(prompt)
    assert conversation.answers == ((len(prompt), len(prompt) + len("This.<|im_end|>")),)


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("What?", "<V>What?"),
        ("<video>\nWhat?", "<V>What?"),
        ("What? \n <video>", "What?<V>"),
        ("Look at <video> and say", "Look at<V>and say"),
        ("<image>\nWhat?", "<V>What?"),  # LLaVA-Video-178K's placeholder for a video
        ("<video>", "<V>"),
    ],
)
def test_place_of_the_video(render, make_record, text, rendered):
    conversation = render(make_record(text, "This.", **VIDEO))
    vision = "<|vision_start|><|video_pad|><|vision_end|>"
    assert f"<|im_start|>user\n{rendered.replace('<V>', vision)}<|im_end|>\n" in conversation.text


def test_placeholder_in_a_later_turn_and_nouns_on_both_sides(render, make_record):
    conversation = render(make_record("Hi", "Hi", "a <ins>dog</ins> <video> or <ins>cat</ins>", "dog", **VIDEO))
    assert texts(conversation, conversation.nouns) == ["dog", "cat"]
    assert conversation.nouns[0][1] < conversation.media[0] < conversation.nouns[1][0]
    assert "user\nHi<|im_end|>" in conversation.text


def test_image_and_text_records(render, make_record):
    image = render(make_record("<image>\nWhat?", "This.", kind="image", media=Path("a.png")))
    assert texts(image, [image.media]) == ["<|image_pad|>"]
    assert render(make_record("What?", "This.")).media is None


def test_own_system_prompt_replaces_the_default(render, make_record):
    conversation = render(make_record(("system", "Be brief."), "What?", "This.", **VIDEO))
    assert conversation.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")


@pytest.mark.parametrize(
    ("prompt", "system"),
    [
        (None, SYSTEM),
        ("Look closely.", "<|im_start|>system\nLook closely.<|im_end|>\n"),
        (" two\nlines ", "<|im_start|>system\n two\nlines <|im_end|>\n"),
        ("", ""),
    ],
)
def test_system_prompt_of_all_records(processor, make_record, prompt, system):
    render = ConversationRenderer(processor, prompt)
    plain = ConversationRenderer(processor)
    texts_of = ("The <ins>dog</ins>?", "A <ins>dog</ins>.", "And?", "dog", "Bye")
    conversation, before = render(make_record(*texts_of, **VIDEO)), plain(make_record(*texts_of, **VIDEO))
    assert conversation.text == system + before.text.removeprefix(SYSTEM)
    for name in ("nouns", "answers"):
        spans = getattr(conversation, name)
        assert texts(conversation, spans) == texts(before, getattr(before, name)) and len(spans) == 2
    assert texts(conversation, [conversation.media]) == ["<|video_pad|>"]
    own = make_record(("system", "Be brief."), "What?", "This.", **VIDEO)
    assert render(own) == plain(own)  # a record's own goes before
    assert pickle.loads(pickle.dumps(render))(make_record("a", "b")) == render(make_record("a", "b"))


def test_system_prompts_that_cannot_be_used(processor):
    with pytest.raises(OptionError, match=r"system_prompt holds '<\|im_end\|>', a special token of this model; remove"):
        ConversationRenderer(processor, "a<|im_end|>")
    other = copy_of(processor)
    other.chat_template = template(turn="{% if m.role != 'system' %}" + QWEN, end="<|im_end|>\n{% endif %}")
    with pytest.raises(ProcessorError, match="the chat template does not show system_prompt as it is"):
        ConversationRenderer(other, "Look closely.")
    other.chat_template = template(turn=QWEN.replace("p.text if", "p.text|trim if"))
    with pytest.raises(ProcessorError, match="white space at its ends is dropped"):
        ConversationRenderer(other, "Look closely. ")
    numbered = "{% for m in messages %}{{ loop.index }}/{{ messages|length }}" + QWEN + "<|im_end|>\n{% endfor %}"
    other.chat_template = numbered
    with pytest.raises(ProcessorError, match="the system turn cannot be told from the rest of the chat template"):
        ConversationRenderer(other, "")


def test_a_template_without_default_system_turn_has_none_to_leave_out(processor, make_record):
    other = copy_of(processor)
    other.chat_template = template()
    record = make_record("a", "b")
    assert ConversationRenderer(other, "")(record) == ConversationRenderer(other)(record)
    changing = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system%d' % (messages|length > 3) }}{% endif %}"
    other.chat_template = changing + template()
    with pytest.raises(ProcessorError, match="system turn changes with the conversation and cannot be left out"):
        ConversationRenderer(other, "")


def test_headers_of_the_answers_are_labelled_if_asked_for(processor, render, make_record):
    record = make_record(("system", "assistant"), "assistant?", "assistant", "And?", "", "Bye", **VIDEO)
    plain, found = render(record), ConversationRenderer(processor, label_header=True)(record)
    assert plain.labels == plain.answers
    assert dataclasses.replace(found, labels=plain.labels) == plain
    assert texts(found, found.labels) == [
        "<|im_start|>assistant\nassistant<|im_end|>",
        "<|im_start|>assistant\n<|im_end|>",
    ]
    assert [end for _, end in found.labels] == [end for _, end in found.answers]


def test_templates_without_a_header_to_label(processor, make_record):
    other = copy_of(processor)
    other.chat_template = "{% for m in messages %}{{ m.content[-1].text }}<|im_end|>{% endfor %}"
    ConversationRenderer(other)
    with pytest.raises(ProcessorError, match="label_header is on, but the chat template writes no header before an an"):
        ConversationRenderer(other, label_header=True)
    ends = "{{ '<|im_start|>%s\n' % ('assistant' if messages|length < 3 else 'helper') if add_generation_prompt }}"
    role = "{{ 'helper' if loop.index > 2 and m.role == 'assistant' else m.role }}"
    turn = QWEN.replace("{{ m.role }}", role) + "<|im_end|>\n"
    other.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + ends
    assert len(ConversationRenderer(other)(make_record("a", "b", "c", "d")).answers) == 2
    render = ConversationRenderer(other, label_header=True)
    with pytest.raises(DataError, match="begins this answer with .*helper.n' instead of the header '<.im_start.>assis"):
        render(make_record("a", "b", "c", "d"))


def test_a_conversation_that_ends_with_a_question(render, make_record):
    conversation = render(make_record("a", "b", "c"))
    assert texts(conversation, conversation.answers) == ["b<|im_end|>"]


def test_placeholder_in_an_answer_is_text(render, make_record):
    conversation = render(make_record("Which tag?", "The <video> tag."))
    assert texts(conversation, conversation.answers) == ["The <video> tag.<|im_end|>"]


@pytest.mark.parametrize(
    ("turns", "options", "key", "reason"),
    [
        (["What is <ins>this?", "b"], {}, "conversations[0]", "<ins> is never closed"),
        (["<video> and <video>", "b"], VIDEO, "conversations[0]", "more than one <video> or <image> placeholder"),
        (["<video>a", "b", "<image>c"], VIDEO, "conversations[2]", "a second <video> or <image> placeholder"),
        (["<video>a", "b"], {}, "conversations[0]", "the text holds <video> but the record names no video or image"),
        (["a <ins>big <video> dog</ins>", "b"], VIDEO, "conversations[0]", "<video> inside an <ins> tag"),
        (["see <|video_pad|>", "b"], VIDEO, "conversations[0]", "the text holds '<|video_pad|>', a special token"),
        (["see <|image_pad|>", "b"], VIDEO, "conversations[0]", "the text holds '<|image_pad|>', a special token"),
        (["a", "end <|im_end|> of"], {}, "conversations[1]", "the text holds '<|im_end|>', a special token"),
        (["a<|im_<ins>start</ins>|>", "b"], {}, "conversations[0]", "the text holds '<|im_start|>', a special token"),
        ([("assistant", "a"), "b"], {}, "conversations", "the conversation begins with an answer"),
        ([("system", "a"), ("assistant", "b")], VIDEO, "conversations", "no user turn in which the video"),
    ],
)
def test_bad_conversations(render, make_record, turns, options, key, reason):
    with pytest.raises(DataError) as error:
        render(make_record(*turns, **options))
    assert error.value.key == key
    assert error.value.reason.startswith(reason)


QWEN = "<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text if 'text' in p else '<|video_pad|>' }}{% endfor %}"


def template(turn=QWEN, end="<|im_end|>\n"):
    start = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    return "{% for m in messages %}" + turn + end + "{% endfor %}" + start


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (template(end="\n"), "ends an assistant turn with"),
        (template(turn=QWEN + "{{ 'Hm.' if loop.last }}"), "renders the turns before an answer differently"),
        (
            template(turn="{{ 'Turns: %d' % messages|length if loop.first }}" + QWEN),
            "renders the turns before an answer",
        ),
        (
            template(turn=QWEN.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role|upper }}")),
            "renders the turns",
        ),
        (template(turn=QWEN + "{{ raise_exception('no') }}"), "refuses the conversation: no"),
        ("{% for m in messages %}{{ m.content[0].text }}<|im_end|>{{ m.content[0].text }}{% endfor %}", "leaves out"),
        (None, "Cannot use apply_chat_template"),
    ],
)
def test_unusable_templates_are_refused_at_once(processor, chat_template, reason):
    other = copy_of(processor)
    other.chat_template = chat_template
    with pytest.raises(ValueError, match="this processor cannot be used for training") as error:
        ConversationRenderer(other)
    assert reason in str(error.value)
    assert not isinstance(error.value, DataError)


def test_a_template_that_trims_is_found_out_only_where_it_matters(processor, make_record):
    other = copy_of(processor)
    other.chat_template = template(turn=QWEN.replace("p.text if", "p.text|trim if"))
    render = ConversationRenderer(other)
    assert render(make_record("a", "b")).text.endswith("assistant\nb<|im_end|>\n")
    with pytest.raises(DataError, match="changes the text of a turn"):
        render(make_record("a ", "b"))


def test_a_template_that_shows_the_video_twice(processor, make_record):
    other = copy_of(processor)
    other.chat_template = template(turn=QWEN.replace("'<|video_pad|>'", "'<|video_pad|><|video_pad|>'"))
    with pytest.raises(DataError, match="renders one video as 2 × '<|video_pad|>' instead of one".replace("|", r"\|")):
        ConversationRenderer(other)(make_record("a", "b", **VIDEO))


def test_picklable(render, make_record):
    record = make_record("<ins>a</ins>", "b", **VIDEO)
    assert dataclasses.asdict(pickle.loads(pickle.dumps(render))(record)) == dataclasses.asdict(render(record))


def copy_of(processor):
    return pickle.loads(pickle.dumps(processor))


@pytest.mark.parametrize("turns", [["a", "b"] * 2_000, ["a" + " " * 200_000 + "b", "c"]], ids=["turns", "white space"])
def test_long_conversations_take_linear_time(render, make_record, turns):
    begin = time.process_time()
    assert len(render(make_record(*turns)).answers) == len(turns) // 2
    assert time.process_time() - begin < 8  # minutes, if the time were quadratic


def test_the_placeholder_takes_the_white_space_around_it(render, make_record):
    for text in ("a \n <video>\t b", "a<video>b"):
        start, end = render(make_record(text, "c", **VIDEO)).media
        assert render(make_record(text, "c", **VIDEO)).text[start - 1 - len("<|vision_start|>")] == "a"
    with pytest.raises(DataError, match="more than one <video>"):
        render(make_record("<video>  <video>", "c", **VIDEO))
