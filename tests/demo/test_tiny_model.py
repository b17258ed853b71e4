import subprocess
import sys

import numpy as np
import pytest
import torch

from swim_fast.demo.texts import all_texts
from swim_fast.demo.tiny_model import (
    SPECIAL_TOKENS,
    SYSTEM_PROMPT,
    ModelSize,
    build_checkpoint,
    build_config,
    build_model,
    build_processor,
    train_tokenizer,
)

TEXTS = ["What is the ball doing?", "It moves to the left.", "Is the flower big or small?"] * 3
SMALL = ModelSize(hidden_size=64, num_layers=2, vision_hidden_size=32, vision_intermediate_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"), TEXTS, seed=0, vocab_size=320, size=SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("text", ["What is the ball doing?", "naïve Öl 球 🙂\n\ttabs  and  spaces", "<ins>", "12,345"])
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_gives_character_offsets(tokenizer):
    text = "What is the ball doing?"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[a:b] for a, b in encoded["offset_mapping"]]
    assert "".join(pieces) == text and " ball" in pieces


def test_tokenizer_learns_words_and_splits_unknown_ones(tokenizer):
    assert len(tokenizer(" left").input_ids) == 1
    assert len(tokenizer(" zebra").input_ids) > 1


def test_special_tokens_are_single_and_last(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids[0] == ids[1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_pretokenises_like_qwen2():
    """Digits stand alone and words keep the space before them, as the Qwen2 pattern has it."""
    split = train_tokenizer(["x"], 256).backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12 red balls.")
    assert [piece for piece, _ in split] == ["It", "'s", "Ġ", "1", "2", "Ġred", "Ġballs", "."]


def test_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 200; a byte-level vocabulary needs at least the 256 bytes"):
        train_tokenizer(TEXTS, 200)


def test_demo_words_are_single_tokens():
    from swim_fast.demo.scenes import NOUNS

    tokenizer = train_tokenizer(list(all_texts()), 512)
    assert all(len(tokenizer(f" {noun}").input_ids) == 1 for noun in NOUNS)


CONVERSATION = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A ball."}]},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "It moves."},
]
RENDERED = (
    f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What is it?<|im_end|>\n"
    "<|im_start|>assistant\nA ball.<|im_end|>\n"
    "<|im_start|>user\nAnd then?<|im_end|>\n"
    "<|im_start|>assistant\nIt moves.<|im_end|>\n"
)


def test_chat_template_renders_like_qwen25_vl(processor):
    assert processor.apply_chat_template(CONVERSATION) == RENDERED
    assert processor.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True) == RENDERED.split("A ball.")[0]


def test_chat_template_is_prefix_stable(processor):
    for turns in range(1, len(CONVERSATION)):
        start = processor.apply_chat_template(CONVERSATION[:turns])
        assert RENDERED.startswith(start)
        if turns % 2:
            start = processor.apply_chat_template(CONVERSATION[:turns], add_generation_prompt=True)
            assert RENDERED.startswith(start)


def test_chat_template_system_turn_and_several_media(processor):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "a\n"},
                {"type": "image"},
                {"type": "video"},
                {"type": "text", "text": "b"},
            ],
        },
    ]
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert processor.apply_chat_template(conversation) == f"{start}{image}a\n{image}{video}b<|im_end|>\n"
    assert (
        processor.apply_chat_template(conversation, add_vision_id=True)
        == f"{start}Picture 1: {image}a\nPicture 2: {image}Video 1: {video}b<|im_end|>\n"
    )


def video_inputs(processor):
    from transformers.video_utils import VideoMetadata

    frames = np.random.default_rng(0).integers(0, 255, (4, 3, 140, 168), np.uint8)
    return processor(
        text=[processor.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True)],
        videos=[torch.from_numpy(frames)],
        do_sample_frames=False,
        video_metadata=[VideoMetadata(total_num_frames=16, fps=8.0, frames_indices=[0, 4, 8, 12])],
        return_tensors="pt",
    )


def test_processor_leaves_small_clips_their_size(processor):
    inputs = video_inputs(processor)
    assert inputs["video_grid_thw"].tolist() == [[2, 10, 12]]
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 2 * 5 * 6
    assert inputs["second_per_grid_ts"].tolist() == [1.0]


def test_model_fits_its_tokenizer(folder, processor):
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = processor.tokenizer
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.video_token_id == processor.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert model.config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.dtype == torch.float32


def test_stock_transformers_loads_and_generates(folder):
    """In a process that never imports swim_fast; the same inputs give the same tokens twice."""
    script = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
image = torch.arange(3 * 56 * 84, dtype=torch.uint8).view(3, 56, 84)
inputs = processor(text=[text], images=[image], return_tensors="pt")
runs = [model.generate(**inputs, max_new_tokens=3, min_new_tokens=3) for _ in range(2)]
assert torch.equal(*runs) and runs[0].shape[1] == inputs["input_ids"].shape[1] + 3
assert not any(name.split(".")[0] == "swim_fast" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, cwd=folder)


def test_same_seed_same_files(folder, tmp_path):
    again = build_checkpoint(tmp_path / "a", TEXTS, seed=0, vocab_size=320, size=SMALL)
    other = build_checkpoint(tmp_path / "b", TEXTS, seed=1, vocab_size=320, size=SMALL)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert [n for n in names if (folder / n).read_bytes() != (other / n).read_bytes()] == ["model.safetensors"]


def test_building_leaves_the_random_state_alone(tokenizer):
    state = torch.get_rng_state()
    build_model(tokenizer, SMALL, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_default_size_is_tiny_and_trains(tokenizer):
    model = build_model(tokenizer, seed=0)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    inputs = video_inputs(build_processor(tokenizer))
    inputs.pop("video_metadata", None)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize(("hidden", "heads"), [(100, 3), (64, 8)])
def test_head_size_that_mrope_cannot_share_out_is_refused(tokenizer, hidden, heads):
    with pytest.raises(ValueError, match=f"hidden_size {hidden} over num_heads {heads} gives a head size of"):
        build_config(tokenizer, ModelSize(hidden_size=hidden, num_heads=heads))
