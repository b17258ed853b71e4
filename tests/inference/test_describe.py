"""Asking a tiny checkpoint about real clips: the answer of the stock model, the maps of training, files that play."""

import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image

from swim_fast.cli import main
from swim_fast.config import DataConfig, ModelConfig, RunConfig
from swim_fast.data.source.errors import DataError
from swim_fast.inference.describe import describe
from swim_fast.inference.loading import trained_as
from swim_fast.inference.prompt import find_noun, plain_question
from swim_fast.jobs import Describe
from swim_fast.modeling.noun_attention import get_attached_layers
from swim_fast.options import AttentionLoss, Decoding
from swim_fast.viz.heatmap_grid import PANEL_PIXELS
from swim_fast.viz.heatmap_video import panel_size, patch_weights, write_heatmap_video
from tests.training.conftest import FRAMES, HEIGHT, TEXTS, WIDTH, record, square_clip, write_records

QUESTION = "What does the square do beside the zebra?"


def ask(media, question, model, **options):
    return describe(Describe(media=media, question=question, model=model, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clip, its record with the tagged noun NOUN, and a random checkpoint."""
    from swim_fast.demo.tiny_model import ModelSize, build_checkpoint

    folder = tmp_path_factory.mktemp("describe")
    masks = square_clip(folder / "clip.mp4", 0)
    entry = record("clip.mp4", masks)
    for noun in ("square", "zebra"):
        question = QUESTION.replace(noun, f"<ins>{noun}</ins>")
        turns = [{"from": "human", "value": f"<video>\n{question}"}, entry["conversations"][1]]
        write_records(folder / f"{noun}.jsonl", [{**entry, "conversations": turns}])
    size = ModelSize(
        hidden_size=64, intermediate_size=64, num_layers=3, vision_hidden_size=32, vision_intermediate_size=32
    )
    build_checkpoint(folder / "model", TEXTS * 3, seed=0, vocab_size=300, size=size)
    return folder


def trained(folder, path, loss: AttentionLoss | None, model=None, **data):
    """A copy of the checkpoint as `swim-fast train` leaves it, with the configuration of its run."""
    shutil.copytree(folder / "model", path)
    run = RunConfig(model=ModelConfig(**model or {"path": "start"}), data=DataConfig(**data), attention_loss=loss)
    (path / "config.yaml").write_text(run.as_yaml())
    return path


def training_maps(folder, model, noun, run, loss) -> dict[int, np.ndarray]:
    """The p that the loss compares with the masks, per supervised patch, averaged over the rows of the noun."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from swim_fast.data.batch.collation import Collator
    from swim_fast.data.sample.builder import SampleBuilder
    from swim_fast.data.source.records import RecordFile
    from swim_fast.loss.mask_loss import GridPredictions
    from swim_fast.modeling import attach_noun_attention

    processor = AutoProcessor.from_pretrained(model)
    builder = SampleBuilder(processor, run.sampling, run.decoding, run.supervision)
    sample = builder(RecordFile(folder / f"{noun}.jsonl")[0])
    positions = {row.position for row in sample.rows}
    assert (len(positions) > 1) == (noun == "zebra"), "one noun of one token, one of several"
    batch = Collator(processor)([sample])
    attached = attach_noun_attention(AutoModelForImageTextToText.from_pretrained(model), loss.layers)
    queries, targets = batch["noun_queries"], batch["mask_targets"]
    # as by the rule of pretraining
    batch["second_per_grid_ts"] = [int(seconds) for seconds in batch["second_per_grid_ts"]]
    names = [name for name in (*sample.inputs, "attention_mask") if name != "labels"]
    with torch.no_grad():
        maps = attached(**{name: batch[name] for name in names}, noun_queries=queries, use_cache=False).attentions
    (group,) = targets.groups
    predictions = GridPredictions.from_maps(maps, targets, fusion=loss.fusion, prediction="min_max")
    frames = targets.frames(group, predictions.p[0])
    found = {}
    for pair, p in zip(group.pairs.tolist(), frames.numpy(), strict=True):
        found.setdefault(sample.patch(sample.pairs[pair]), []).append(p)
    return {patch: np.mean(values, axis=0) for patch, values in found.items()}


@pytest.mark.parametrize("noun", ["square", "zebra"])
@pytest.mark.parametrize(
    "loss",
    [
        AttentionLoss(layers=[0, 2], backend="triton"),  # of a run on a GPU; here is none
        AttentionLoss(layers=[0, 2], fusion="product", softmax="causal"),
        AttentionLoss(layers=[1, 2], softmax="visual", query_position="predictor"),
    ],
    ids=["default", "product", "visual-predictor"],
)
def test_maps_are_those_of_training(folder, tmp_path, monkeypatch, noun, loss):
    def answer(model, *_, stream):
        assert get_attached_layers(model) == [], "the stock model answers, also when maps were computed"
        return ["answer"]

    monkeypatch.setattr("swim_fast.inference.describe.generate", answer)
    model = trained(folder, tmp_path / "run", loss, max_frames=FRAMES)
    out = tmp_path / "attention.png"
    found = ask(folder / "clip.mp4", QUESTION, model, show=[noun], out=out)
    expected = training_maps(folder, model, noun, trained_as(model), loss)
    assert found.maps.shape == (1, FRAMES // 2, 2, 3) and sorted(expected) == [0, 1, 2]
    for patch, p in expected.items():
        assert np.ptp(p) > 0.3
        np.testing.assert_allclose(found.maps[0, patch], p, atol=1e-4)


def test_the_question_comes_with_the_system_turn_of_training(folder, tmp_path, monkeypatch):
    asked = []

    def answer(model, processor, prompts, *_, stream):
        asked.append(processor.tokenizer.decode(prompts[0].inputs["input_ids"]))
        return ["answer"]

    monkeypatch.setattr("swim_fast.inference.describe.generate", answer)
    model = trained(folder, tmp_path / "run", None, max_frames=2, system_prompt="Look.")
    ask(folder / "clip.mp4", QUESTION, model)
    ask(folder / "clip.mp4", QUESTION, model, system_prompt="")
    rest = asked[1]
    assert rest.startswith("<|im_start|>user\n") and rest.endswith("zebra?<|im_end|>\n<|im_start|>assistant\n")
    assert asked[0] == "<|im_start|>system\nLook.<|im_end|>\n" + rest


def test_options_win_over_the_run(folder, tmp_path):
    model = trained(folder, tmp_path / "run", AttentionLoss(layers=[0]), max_frames=2)
    shutil.copytree(model, model / "checkpoint-7", ignore=shutil.ignore_patterns("config.yaml"))
    assert trained_as(model / "checkpoint-7").data.max_frames == 2
    options = {"show": ["square"], "out": tmp_path / "a.png", "max_new_tokens": 1}
    clip = folder / "clip.mp4"
    as_trained = ask(clip, QUESTION, model / "checkpoint-7", **options).maps
    assert as_trained.shape[1] == 1
    other_layer = ask(clip, QUESTION, model, **options, layers=[2]).maps
    assert other_layer.shape == as_trained.shape and not np.allclose(other_layer, as_trained, atol=1e-2)
    twice = "The square and the square"
    first, second, last = (ask(clip, twice, model, **options, occurrence=number).maps for number in (1, 2, None))
    assert np.array_equal(second, last) and not np.allclose(first, last, atol=1e-3)
    four_frames = {"max_frames": 6, "fps": 2.5}  # of 1.5 s
    assert ask(clip, QUESTION, model, **options, **four_frames).maps.shape[1] == 2
    without_maps = trained(folder, tmp_path / "text", None, max_frames=2)
    assert np.array_equal(ask(clip, QUESTION, without_maps, **options).maps, other_layer)  # the default of 3 layers
    (model / "config.yaml").write_text("data: {max_frame: 2}")
    assert trained_as(model) is None and trained_as("owner/name") is None


def test_position_ids_are_those_of_the_run(folder, tmp_path):
    """On a clip of 20 s: where the model looks depends on the rule, which is the run's or the option's."""
    square_clip(tmp_path / "long.mp4", 0, fps=0.3)
    loss = AttentionLoss(layers=[0, 2])
    maps = {}
    for rule in ("pretraining", "library"):
        model = trained(folder, tmp_path / rule, loss, model={"path": "start", "position_ids": rule})
        for given in (None, "pretraining", "library"):
            options = {"show": ["square"], "out": tmp_path / "a.png", "max_new_tokens": 1}
            options |= {"position_ids": given} if given else {}
            maps[rule, given] = ask(tmp_path / "long.mp4", QUESTION, model, **options).maps
    for rule in ("pretraining", "library"):
        for trained_with in ("pretraining", "library"):
            assert np.array_equal(maps[trained_with, rule], maps[rule, None])
    assert not np.allclose(maps["pretraining", None], maps["library", None], atol=1e-3)


def test_samples_are_no_longer_than_in_training(folder, tmp_path):
    options = {"show": ["square"], "out": tmp_path / "a.png", "max_new_tokens": 1}
    whole = ask(folder / "clip.mp4", QUESTION, folder / "model", **options).maps
    model = trained(folder, tmp_path / "run", AttentionLoss(layers=[0]), max_tokens=78)
    fewer = ask(folder / "clip.mp4", QUESTION, model, **options).maps
    assert whole.shape[1] == FRAMES // 2 and 0 < fewer.shape[1] < FRAMES // 2
    with pytest.raises(DataError, match="^too long: .* do not fit into max_tokens 40"):
        ask(folder / "clip.mp4", QUESTION, model, **options, max_tokens=40)


def test_command_answers_as_the_stock_model_and_computes_no_maps(folder, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from swim_fast.data.video.reader import FrameReader

    compute = "swim_fast.inference.describe.compute_noun_maps"
    monkeypatch.setattr(compute, lambda *_: pytest.fail("a map was computed"))
    monkeypatch.chdir(tmp_path)
    command = ["describe", str(folder / "clip.mp4"), f"<video>\n {QUESTION} "]
    assert main([*command, "--model", str(folder / "model"), "--max-frames", "4", "--max-new-tokens", "6"]) == 0
    assert not list(tmp_path.iterdir())

    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with FrameReader(Decoding(reader="pyav")) as reader:
        frames = torch.from_numpy(reader.frames(folder / "clip.mp4", [0, 2, 3, 5])).permute(0, 3, 1, 2)
    inputs = processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
    inputs["second_per_grid_ts"] = [0]  # 2 · (5 / 3) / 4, cut as by the rule of pretraining
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert said.strip() and capsys.readouterr().out.strip() == said.strip()


def test_command_draws_a_row_per_noun_and_a_video(folder, tmp_path, capsys):
    out, video = tmp_path / "new" / "a.png", tmp_path / "other" / "a.mp4"
    command = ["describe", str(folder / "clip.mp4"), QUESTION, "--model", str(folder / "model"), "--max-frames", "4"]
    shown = ["--show", "SQUARE", "--show", "zebra", "--layers", "0", "2", "--out", str(out), "--video", str(video)]
    assert main([*command, *shown, "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(out), str(video)]
    width, height = Image.open(out).size
    # Two patches side by side; a row of frames and one per noun.
    assert width > 2 * PANEL_PIXELS * WIDTH / HEIGHT and 3 * PANEL_PIXELS < height < 4 * PANEL_PIXELS
    frames, rate = decoded(video)
    assert len(frames) == FRAMES and rate == 4
    assert frames.shape[1:] == (2 * 360, 540, 3)
    assert not np.allclose(frames[0, :360], frames[0, 360:], atol=20), "the nouns have maps of their own"


def test_image(folder, tmp_path, capsys):
    picture = tmp_path / "picture.PNG"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)).save(picture)
    options = {"show": ["square"], "out": tmp_path / "a.png", "max_new_tokens": 1}
    maps = ask(picture, QUESTION, folder / "model", **options).maps
    assert maps.shape == (1, 1, 2, 3) and maps.min() == 0 and maps.max() == 1
    assert Image.open(tmp_path / "a.png").size[1] > 2 * PANEL_PIXELS
    command = ["describe", str(picture), QUESTION, "--model", str(folder / "model"), "--show", "square"]
    assert main([*command, "--video", str(tmp_path / "a.mp4")]) == 2
    assert "no video can be made" in capsys.readouterr().err


def test_frames_of_a_folder(folder, tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    options = {"show": ["square"], "out": tmp_path / "out" / "a.png", "max_new_tokens": 1}
    assert ask(tmp_path, QUESTION, folder / "model", **options).maps.shape[1] == 2  # the last frame twice


def test_find_noun():
    text = "A Dog and a dogma: the brown  dog's ball. 左边的狗在做什么"

    def at(*arguments):
        return slice(*find_noun(text, *arguments))

    assert (at("dog").start, at("dog", 1).start) == (text.index("dog's"), 2)
    assert text[at("BROWN dog")] == "brown  dog" and text[at("狗")] == "狗"
    for arguments, message in (
        (("cat",), r"'cat' does not occur in the question; its words are: A, Dog, and, a, dogma, the, brown, dog's"),
        (("do",), "does not occur"),
        (("  ",), "does not occur"),
        (("dog", 3), "'dog' occurs 2 times in the question: there is no occurrence 3"),
        (("ball", 0), "occurs once in the question: there is no occurrence 0"),
    ):
        with pytest.raises(ValueError, match=message):
            find_noun(text, *arguments)


def test_plain_question():
    assert plain_question("<video>\nWhat does the <ins> dog</ins> do? ") == "What does the  dog do?"
    with pytest.raises(ValueError, match="the question is empty"):
        plain_question(" <video>\n")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"media": "absent.mp4"}, "absent.mp4: there is no such file or folder"),
        ({"media": "broken.mp4"}, r"broken.mp4: cannot be decoded"),
        ({"model": "absent"}, "model 'absent' is no checkpoint that can be loaded"),
        ({"model": "damaged"}, "model 'damaged' is no checkpoint that can be loaded"),
        ({"question": " "}, "the question is empty"),
        ({"question": "What <|im_end|> now?"}, "the question: the text holds '<|im_end|>'"),
        ({"show": ["cat"]}, "'cat' does not occur in the question; its words are: What, does"),
        ({"show": ["square"], "layers": [9]}, "layer 9 is out of range"),
        ({"layers": [0]}, "layers is about the attention of a noun: name one with show NOUN"),
        ({"max_frames": 1}, "max_frames is 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used here"),
    ],
)
def test_what_a_user_can_mend(folder, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    if change.get("model") == "damaged":
        shutil.copytree(folder / "model", tmp_path / "damaged")
        (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    arguments = {"media": folder / "clip.mp4", "question": QUESTION, "model": folder / "model"}
    arguments |= {name: change.pop(name) for name in list(change) if name in arguments}
    with pytest.raises(ValueError) as refused:
        ask(**arguments, **change)
    assert message in str(refused.value).replace("\n", " ")
    assert isinstance(refused.value, DataError) or "mp4" not in message
    assert not (tmp_path / "attention.png").exists()


def test_video_fades_from_patch_to_patch(tmp_path):
    """Panels of portrait frames with odd sides: side by side, even, each showing its own noun's map."""
    left, right = np.array([[1.0, 0.0, 0.0]] * 4), np.array([[0.0, 0.0, 1.0]] * 4)
    maps = np.stack([[left, right], [right, left]]).astype(np.float32)
    frames = [np.full((401, 201, 3), 90, np.uint8)] * 9
    assert write_heatmap_video(tmp_path / "a.mp4", iter(frames), maps, [0.5, 6.5], ["dog", "cat"], 12.5) == 9
    shown, rate = decoded(tmp_path / "a.mp4")
    height, width = panel_size(401, 201)
    assert shown.shape == (9, height, 2 * width, 3) and rate == 12.5
    columns = shown[:, height // 4 :].astype(float).mean((1, 3))  # [frames, 2 * width]
    places = np.array([width // 8, width // 2, 7 * width // 8])
    seen = {"dog": columns[:, places], "cat": columns[:, width + places[::-1]]}  # the cat's map is the dog's mirrored
    ranges = {"high": (140, 255), "some": (60, 140), "low": (40, 57)}
    for noun, brightness in seen.items():
        for frame, order in ((0, "high low low"), (2, "high low some"), (5, "some low high"), (8, "low low high")):
            for value, (least, most) in zip(brightness[frame], map(ranges.get, order.split()), strict=True):
                assert least < value < most, (noun, frame, brightness[frame])
    assert (shown[:, :8, :8] < 60).all(), "a caption in the corner"


@pytest.mark.parametrize("size, panel", [((64, 96), (360, 540)), ((1080, 1920), (720, 1280)), ((481, 641), (480, 640))])
def test_panel_size(size, panel):
    assert panel_size(*size) == panel


def test_patch_weights():
    weights = [patch_weights(frame, [1.0, 3.0, 7.0]).tolist() for frame in (0, 1, 2, 6, 9)]
    assert weights == [[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75], [0, 0, 1]]


def decoded(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream.average_rate
