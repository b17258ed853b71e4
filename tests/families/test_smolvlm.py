"""What SmolVLM2 needs beside the suite: an answer that begins with a space, tiles, and no cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

from swim_fast.data.batch.collation import model_inputs
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.records import Record, Turn
from swim_fast.errors import ProcessorError
from swim_fast.families import get_layout
from swim_fast.inference.loading import CheckpointError, load_processor
from swim_fast.modeling import attach_noun_attention, detach_noun_attention
from swim_fast.modeling.prepare import prepare_model, restore_model
from tests.families.test_data import encode
from tests.families.test_models import batch_of, losses_of, sample_of
from tests.families.tiny import tiny

NAME = "SmolVLM2"
pytestmark = pytest.mark.needs("num2words")


def test_an_answer_begins_with_the_space_that_the_prompt_lacks():
    builder = SampleBuilder(tiny(NAME).processor)
    encoding, conversation = encode(NAME, "video")
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is the dog doing?"}]}]
    prompt = tiny(NAME).processor.apply_chat_template(messages, add_generation_prompt=True)
    start, end = conversation.answers[0]
    assert conversation.text[:start] == prompt and conversation.text[start:end] == " It runs.<end_of_utterance>"
    labels = encoding.inputs["labels"]
    assert tiny(NAME).processor.tokenizer.decode(labels[labels >= 0]) == " It runs.<end_of_utterance>"
    assert builder.render.gap == " "
    with_header = SampleBuilder(tiny(NAME).processor).render.__class__(tiny(NAME).processor, label_header=True)
    found = with_header(Record("", 0, "", (Turn("user", "What?"), Turn("assistant", "It runs.")), "text", None, ()))
    assert found.text[slice(*found.labels[0])] == "Assistant: It runs.<end_of_utterance>"


def test_an_image_of_one_tile_has_the_small_picture_as_its_cells():
    processor = copy.deepcopy(tiny(NAME).processor)
    processor.image_processor.do_image_splitting = False
    layout, clip = get_layout(processor), None
    pixels = torch.zeros(1, 30, 50, 3, dtype=torch.uint8).numpy()
    inputs = layout.prepare("image", pixels, clip)
    assert layout.cells("image", inputs, torch.arange(4)).tolist() == [[[0, 1], [2, 3]]]
    assert inputs["pixel_values"].shape == (1, 1, 3, 56, 56)


def test_images_of_no_whole_number_of_tiles_are_refused():
    processor = copy.deepcopy(tiny(NAME).processor)
    processor.image_processor.size = {"longest_edge": 100}
    with pytest.raises(ProcessorError, match="only a longest edge of whole tiles is known here"):
        get_layout(processor)


def test_what_to_install_is_said(tmp_path, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    tiny(NAME).processor.save_pretrained(tmp_path)
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(CheckpointError, match="Install it with `pip install num2words`"):
        load_processor(tmp_path)


def test_a_cache_is_left_out_for_queries_and_packed_samples_alone():
    model = tiny(NAME).build()
    batch = batch_of(NAME, model, sample_of(NAME))
    inputs = model_inputs(batch)

    def cache_of(**about):
        found = model(**inputs, **about)
        return found["past_key_values" if "past_key_values" in found else "cache"]

    attach_noun_attention(model)
    assert cache_of() is not None
    assert "past_key_values" not in losses_of(model, batch) and "cache" not in losses_of(model, batch)
    cache = DynamicCache(config=model.config.text_config)
    with pytest.raises(ValueError, match="noun_queries cannot be used while generating"):
        model(**inputs, noun_queries=batch["noun_queries"], past_key_values=cache)
    detach_noun_attention(model)
    assert "_contexts" not in vars(model)
    prepare_model(model, packed=True)
    restore_model(model)
    assert "_contexts" not in vars(model)
