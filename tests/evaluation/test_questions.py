"""VideoRefer-Bench-Q from the command line, against the model asked one by one with transformers' own means."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from swim_fast.cli import main
from swim_fast.data.sample.sampling import choose_frames
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.data.video.reader import FrameReader
from swim_fast.evaluation.prompts import read_items
from swim_fast.evaluation.questions import published_letter, read_question
from swim_fast.evaluation.run import Ranks, Run
from swim_fast.jobs import Questions
from swim_fast.modeling.positions import set_position_rule
from tests.evaluation.conftest import OPTIONS, arguments, lines, question, results, stable

DIRECTLY = "Answer with the option's letter from the given choices directly."


class OneByOne:
    """The checkpoint, asked without padding."""

    def __init__(self, folder, clips):
        self.model = set_position_rule(AutoModelForImageTextToText.from_pretrained(folder).eval(), "pretraining")
        self.processor = AutoProcessor.from_pretrained(folder)
        self.clips = clips

    @functools.cache  # noqa: B019
    def pixels(self, video):
        with FrameReader() as reader:
            info = reader.info(self.clips / video)
            frames = choose_frames(info.num_frames, [], 4)
            return info, frames, torch.from_numpy(reader.frames(self.clips / video, frames)).permute(0, 3, 1, 2)

    def inputs(self, video, text, answer=""):
        content = [{"type": "video"}, {"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        info, frames, pixels = self.pixels(video)
        kwargs = {"do_sample_frames": False, "input_data_format": "channels_first"}
        kwargs["video_metadata"] = [{"total_num_frames": info.num_frames, "fps": info.fps, "frames_indices": frames}]
        inputs = self.processor(
            text=[prompt + answer],
            videos=[pixels],
            videos_kwargs=kwargs,
            text_kwargs={"return_mm_token_type_ids": True},
            return_tensors="pt",
        )
        spacing = (frames[-1] - frames[0]) / (len(set(frames)) - 1)
        inputs["second_per_grid_ts"] = [2 * spacing / info.fps]
        return inputs

    def say(self, video, text, max_new_tokens):
        inputs = self.inputs(video, text)
        found = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    def score(self, video, text, answer):
        start = self.inputs(video, text)["input_ids"].shape[1]
        inputs = self.inputs(video, text, answer)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        values = [float(logits[i - 1, ids[i]]) for i in range(start, len(ids))]
        pieces = [self.processor.tokenizer.decode(ids[start : start + k]) for k in range(len(values) + 1)]
        letter = next(k for k, piece in enumerate(pieces) if ")" in piece)
        return {"letter": sum(values[:letter]), "total": sum(values), "mean": sum(values) / len(values)}


@pytest.fixture(scope="module")
def one_by_one(checkpoint, clips):
    return OneByOne(checkpoint, clips)


def prompt(number):
    listed = " ".join(f"({letter}) {text}" for letter, text in zip("ABCD", OPTIONS, strict=True))
    return f"What does the {'big ' * number}square do in clip {number}? {listed}. {DIRECTLY}"


def test_answers_and_table(checkpoint, questions, videos, one_by_one, tmp_path, capsys):
    assert main(arguments("questions", checkpoint, questions, tmp_path)) == 0
    expected = {n: one_by_one.say(video, prompt(n), 16) for n, video in enumerate(videos)}
    kept = {entry["record"]: entry for entry in lines(tmp_path / "predictions-rank0.jsonl")[1:]}
    assert {n: kept[n]["answer"] for n in expected} == expected
    assert "answer" not in kept[5] and "broken.mp4" in kept[5]["problem"] and 6 not in kept

    found = results(tmp_path)
    right = [n for n in expected if published_letter(expected[n], "ABCD") == "ABCD"[n % 4]]
    count = found["readings"]["published"]["all"]
    assert (count["answers"], count["right"]) == (5, len(right))
    assert count["unparsable"] == sum(published_letter(text, "ABCD") is None for text in expected.values())
    assert set(found["problems"]) == {"5", "6"}
    assert "refined-VideoRefer-Bench-Q" in found["problems"]["6"] and "<object3><region>" in found["problems"]["6"]
    printed = capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() in printed + "\n"
    for row in ("VideoRefer-7B (published)", "71.9", "80.1", "2 records with no answer, which count nowhere"):
        assert row in printed
    assert "a refined benchmark file: 6 with tagged nouns, 1 with placeholders or no question\n" in printed
    assert found["kind"].startswith("refined")
    text, mask = (printed.index(f"{model} (published)") for model in ("SWIM-7B", "VideoRefer-7B"))
    assert text < mask and "| 78.3 | object named in words" in printed[text:mask]

    # Everything is there: nothing is asked, and what was broken is tried again.
    assert main(arguments("questions", checkpoint, questions, tmp_path)) == 0
    again = lines(tmp_path / "predictions-rank0.jsonl")[1:]
    assert [entry["record"] for entry in again] == [*kept, 5]
    assert stable(tmp_path) == {**found, "problems": ["5", "6"]}


def test_likelihoods(checkpoint, questions, videos, one_by_one, tmp_path, capsys):
    assert main(arguments("questions", checkpoint, questions, tmp_path, "--by", "likelihood", "--limit", 5)) == 0
    kept = {entry["record"]: entry["scores"] for entry in lines(tmp_path / "predictions-rank0.jsonl")[1:]}
    assert list(kept) == [0, 1, 2, 3, 4]
    found = results(tmp_path)["readings"]
    best = {name: 0 for name in ("letter", "total", "mean")}
    for number, video in enumerate(videos):
        options = [f"({letter}) {text}" for letter, text in zip("ABCD", OPTIONS, strict=True)]
        scores = [one_by_one.score(video, prompt(number), option) for option in options]
        for name in best:
            values = [score[name] for score in scores]
            assert [score[name] for score in kept[number]] == pytest.approx(values, abs=2e-4)
            best[name] += values.index(max(values)) == number % 4
    assert {name: found[name]["all"]["right"] for name in best} == best
    assert "likelihood of the option's text, per token" in capsys.readouterr().out


def test_the_rate_of_folders(checkpoint, questions, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoint)
    items, _, _ = read_items(RecordFile(questions), range(6), read_question)
    for rate in (1.0, 24.0):
        options = Questions(model="m", file=questions, out=tmp_path, max_frames=4, folder_fps=rate)
        builder = Run(options, Ranks(0, 1, "cpu")).sample_builder(processor)
        seconds = [builder(items[number].record).inputs["second_per_grid_ts"] for number in (0, 4)]
        assert float(seconds[0]) == pytest.approx(
            2 * 5 / 3 / 4
        )  # of 6 frames at 4 per second, the first and last are in
        assert float(seconds[1]) == pytest.approx(2 * 4 / 3 / rate)  # of 5 frames


def read(tmp_path, *records):
    path = tmp_path / "q.json"
    path.write_text(json.dumps(records))
    return read_items(RecordFile(path), range(len(records)), read_question)


def test_variants_of_the_format(tmp_path):
    conversations = [{"from": "human", "value": "<video>\nWhat does the <ins>square</ins> do?"}]
    lower = {key.lower(): value for key, value in question(0, "a.mp4").items()}
    items, problems, kind = read(
        tmp_path,
        {**lower, "options": ["right", "left"], "answer": "left"},
        {**lower, "question": None, "conversations": conversations, "options": {"a": "x", "B": "y"}, "answer": "b"},
        {**lower, "options": ["A. x", "B. y"], "answer": "(A)", "type": None},
        {"choices": ["x", "y"], "Question": "What?", "Answer": "B", "image": "a.png"},
    )
    assert not problems
    assert [item.options for item in items.values()] == [("(A) right", "(B) left"), *[("(A) x", "(B) y")] * 3]
    assert [item.answer for item in items.values()] == ["B", "B", "A", "B"]
    assert [item.type for item in items.values()] == ["Basic Questions", "Basic Questions", "untyped", "untyped"]
    text = items[1].record.turns[0].text
    assert text == f"What does the square do? (A) x (B) y. {DIRECTLY}"
    assert items[0].record.kind == "video" and items[3].record.kind == "image"
    assert kind == "refined benchmark file: 3 with tagged nouns, 1 with words without tags"


def test_a_refined_record_asks_what_its_words_without_tags_ask(tmp_path):
    tagged = {
        "Question": "What do the <ins>man</ins> and the <ins>dog</ins> do?",
        "options": ["(A) The <ins>man</ins> runs", "(B) The <ins>dog</ins> runs"],
        "Answer": "(B) The <ins>dog</ins> runs",
    }
    plain = {
        key: json.loads(json.dumps(value).replace("<ins>", "").replace("</ins>", "")) for key, value in tagged.items()
    }
    items, problems, kind = read(tmp_path, question(0, "a.mp4", **tagged), question(0, "a.mp4", **plain))
    assert not problems and items[0].record.turns == items[1].record.turns
    assert items[0].options == items[1].options == ("(A) The man runs", "(B) The dog runs")
    assert items[0].answer == items[1].answer == "B"
    assert kind == "refined benchmark file: 1 with tagged nouns, 1 with words without tags"


def test_a_raw_file_is_named_with_the_one_to_take(tmp_path):
    """Not `nl-refer build`, which cannot read it."""
    raw = [question(n, "a.mp4", Question=f"What is <object{n}><region> not wearing?") for n in range(2)]
    with pytest.raises(DataError, match="raw benchmark.*bench/refined-VideoRefer-Bench-Q.json") as error:
        read(tmp_path, *raw)
    assert "nl-refer build" not in str(error.value)
    _, problems, kind = read(tmp_path, *raw, question(2, "a.mp4"))
    assert len(problems) == 2 and kind == "raw benchmark file: 1 with tagged nouns, 2 with placeholders or no question"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"options": ["(A) x"]}, "two or more"),
        ({"options": ["(A) x", "(A) y"]}, "two options have one letter"),
        ({"Answer": "(F) z"}, "none of the options"),
        ({"Answer": None}, "is missing or empty"),
        ({"Question": "What is [<region>] doing?"}, "placeholder <region>.*raw benchmark"),
        ({"Question": " "}, "is missing or empty"),
        ({"Question": None}, "there is no question"),
        ({"video": None}, "names no clip"),
        ({"Question": "What is the <ins>dog doing?"}, "never closed"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, change, reason):
    with pytest.raises(DataError, match=reason) as error:
        read(tmp_path, {**question(0, "a.mp4"), **change})
    assert "q.json, record 0" in str(error.value)
    items, problems, _ = read(tmp_path, {**question(0, "a.mp4"), **change}, question(1, "a.mp4"))
    assert list(items) == [1] and list(problems) == [0]
