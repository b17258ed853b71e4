"""The data side of every family: inputs as its processor makes them, counts without decoding, tokens of each patch."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.records import Record, Turn
from swim_fast.data.video.reader import MediaInfo
from swim_fast.families import FAMILIES, Clip, find_family, get_layout
from swim_fast.options import Sampling
from tests.families.tiny import MAKERS, NEEDS, tiny

FAMILY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.needs(NEEDS[name])] if name in NEEDS else []) for name in MAKERS]
)
FRAMES, FPS = [0, 3, 8, 12, 20, 21], 4.0
QUESTION = (Turn("user", "What is the <ins>dog</ins> doing?"), Turn("assistant", "It runs."))


def kinds_of(name):
    return get_layout(tiny(name).processor).kinds


def frames_of(count, height, width, seed=0):
    """Frames that change slowly, as those of a video do, and so that each differs from the others."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 4, 4))).float()
    return torch.nn.functional.interpolate(coarse, (height, width)).permute(0, 2, 3, 1).byte().numpy()


def encode(name, kind, height=90, width=140, frames=FRAMES, pixels=None):
    """Encode a question about frames of a size."""
    builder = SampleBuilder(tiny(name).processor)
    conversation = builder.render(Record("", 0, "", QUESTION, kind, "a", ({},)))
    pixels = frames_of(len(frames), height, width) if pixels is None else pixels
    if kind == "image":
        return builder.encode.image(conversation, pixels[0]), conversation
    return builder.encode.video(conversation, pixels, frames, MediaInfo(24, FPS, height, width)), conversation


def batch_of(name, *encodings):
    return Collator(tiny(name).processor)([Sample("", e.inputs, cells=e.cells, grids=e.grids) for e in encodings])


@pytest.mark.needs(*NEEDS.values())
def test_every_family_is_tried():
    tried = {find_family(tiny(name).build().config).name for name in MAKERS}
    assert tried == {family.name for family in FAMILIES}


@pytest.mark.parametrize("kind", ["image", "video"])
@FAMILY
def test_inputs_are_those_of_the_processor(name, kind):
    if kind not in kinds_of(name):
        pytest.skip(f"takes no {kind}")
    processor, (found, conversation) = tiny(name).processor, encode(name, kind)
    pixels = frames_of(len(FRAMES), 90, 140)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    if kind == "image":
        wanted = processor(text=[conversation.text], images=[planes[0]], return_tensors="pt")
    else:
        metadata = VideoMetadata(24, FPS, 140, 90, 24 / FPS, None, list(FRAMES))
        about = {"do_sample_frames": False, "video_metadata": [metadata]}
        wanted = processor(text=[conversation.text], videos=[[planes]], videos_kwargs=about, return_tensors="pt")
    batch = batch_of(name, found)
    inputs, seconds = model_inputs(batch), get_layout(processor).seconds
    assert inputs["input_ids"].tolist() == wanted["input_ids"].tolist()
    own = {"input_ids", "attention_mask", "labels", "position_ids"}
    assert inputs.keys() - own <= wanted.keys() | {"mm_token_type_ids"}
    assert wanted.keys() - own - {"mm_token_type_ids"} <= inputs.keys()
    for key in inputs.keys() & wanted.keys() - own - {seconds}:
        assert torch.equal(inputs[key], wanted[key]), key


@pytest.mark.parametrize("height, width", [(90, 140), (56, 56), (300, 64), (61, 203), (112, 168)])
@FAMILY
def test_counts_without_decoding(name, height, width):
    encoder = SampleBuilder(tiny(name).processor).encode
    for kind in kinds_of(name):
        for frames in ([0, 1], FRAMES) if kind == "video" else ([0],):
            found, conversation = encode(name, kind, height, width, frames)
            info = (FPS, 24) if kind == "video" else (1.0, 1)
            text = len(encoder.text_offsets(conversation))
            assert encoder.count(kind, conversation, text, Clip(frames, *info, height, width)) == len(found)


@pytest.mark.parametrize("kind", ["image", "video"])
@FAMILY
def test_cells_are_visual_tokens_each_in_one_place(name, kind):
    if kind not in kinds_of(name):
        pytest.skip(f"takes no {kind}")
    found, _ = encode(name, kind)
    tokens = found.cells[found.cells >= 0]
    assert len(tokens.unique()) == len(tokens) > 0
    assert set(tokens.tolist()) <= set(found.visual().tolist())
    layout = get_layout(tiny(name).processor)
    assert len(found.cells) == (1 if kind == "image" else len(FRAMES) // layout.frames_per_patch)
    noun = found.noun_tokens(0)
    assert tiny(name).processor.tokenizer.decode(found.inputs["input_ids"][noun]).strip() == "dog"
    labels = found.inputs["labels"]
    assert "It runs." in tiny(name).processor.tokenizer.decode(labels[labels >= 0])


@torch.no_grad()
def visual_embeddings(model, name, encoding):
    """The embeddings of the tokens that enter the decoder, [L, H]."""
    seen = []
    language_model = model.get_submodule(find_family(model.config).language_model)
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**model_inputs(batch_of(name, encoding)), use_cache=False)
    finally:
        hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("place", [(0.25, 0.75), (0.75, 0.25)])
@pytest.mark.parametrize("kind", ["image", "video"])
@FAMILY
def test_a_bright_square_lights_its_cell(name, kind, place):
    """The token that a square changes most is that of the cell in which it lies, of the patch that shows it."""
    if kind not in kinds_of(name):
        pytest.skip(f"takes no {kind}")
    model, layout = tiny(name).build(), get_layout(tiny(name).processor)
    height, width = 112, 168
    plain = np.full((len(FRAMES) if kind == "video" else 1, height, width, 3), 90, np.uint8)
    shape = encode(name, kind, height, width, pixels=plain)[0].cells.shape
    row, column = (int(share * n) for share, n in zip(place, shape[1:], strict=True))
    patch = shape[0] // 2
    top, bottom, left, right = layout.view(kind, height, width)
    tall, wide = (bottom - top) / shape[1], (right - left) / shape[2]
    bright = plain.copy()
    rows = slice(round(top + (row + 0.2) * tall), round(top + (row + 0.8) * tall))
    columns = slice(round(left + (column + 0.2) * wide), round(left + (column + 0.8) * wide))
    frames = slice(patch * layout.frames_per_patch, (patch + 1) * layout.frames_per_patch) if kind == "video" else 0
    bright[frames, rows, columns] = 255
    with_square = encode(name, kind, height, width, pixels=bright)[0]
    if len(with_square) == len(encode(name, kind, height, width, pixels=plain)[0]):
        base = visual_embeddings(model, name, encode(name, kind, height, width, pixels=plain)[0])
    else:  # tokens of what does not move are left out: compare with the mean of the others
        base = visual_embeddings(model, name, with_square)[with_square.visual()].mean(0)
    changed = (visual_embeddings(model, name, with_square) - base).norm(dim=-1)
    cells = with_square.cells
    values = torch.where(cells >= 0, changed[cells.clamp(min=0)], 0.0)
    assert np.unravel_index(int(values.argmax()), cells.shape) == (patch, row, column)


@FAMILY
def test_a_saved_processor_encodes_alike(name, tmp_path):
    tiny(name).processor.save_pretrained(tmp_path)
    kind = kinds_of(name)[-1]
    record = Record("", 0, "", QUESTION, kind, "a", ({},))
    found = []
    for processor in (tiny(name).processor, AutoProcessor.from_pretrained(tmp_path)):
        builder = SampleBuilder(processor)
        clip = Clip(FRAMES if kind == "video" else [0], FPS, 24, 90, 140)
        found.append((builder.render(record), builder.encode.layout.count(kind, clip)))
    assert found[0] == found[1]


@FAMILY
def test_layouts_are_pickled_and_refuse_what_they_cannot_do(name):
    layout = get_layout(tiny(name).processor)
    clip = Clip(FRAMES, FPS, 24, 90, 140)
    kind = layout.kinds[-1]
    assert pickle.loads(pickle.dumps(layout)).count(kind, clip) == layout.count(kind, clip)
    low, high = 4 * 32**2, 6 * 32**2
    if len({layout.limits["image"].size(1, *size) for size in ((90, 140), (300, 64))}) == 1:
        with pytest.raises(ValueError, match="takes no limit on the size of images; remove it"):
            SampleBuilder(tiny(name).processor, Sampling(max_pixels=high))
    else:
        limited = SampleBuilder(tiny(name).processor, Sampling(min_pixels=low, max_pixels=high)).encode.layout
        sizes = [limited.limits[kind].size(n, 90, 140) for n in (2, 6)]
        assert sizes[0] == sizes[1] and sizes[0][0] * sizes[0][1] <= high


@pytest.mark.needs(*NEEDS.values())
def test_the_readmes_table_is_true():
    """One row for each model that is tried here: what it takes, frames that share tokens, packing."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("## Models")[2]
    table = [line.strip("| ").split(" | ") for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    wanted = []
    for name in MAKERS:
        layout, family = get_layout(tiny(name).processor), find_family(tiny(name).build().config)
        takes, packed = ", ".join(sorted(layout.kinds, reverse=True)), "yes" if family.packable else "no"
        wanted.append([name, takes, str(layout.frames_per_patch) if "video" in layout.kinds else "–", packed])
    assert table[1:] == wanted and len(wanted) >= 11
