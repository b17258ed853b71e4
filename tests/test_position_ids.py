"""Position ids by value, as the model was pretrained with them."""

import itertools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from swim_fast.position_ids import compute_rope_index, library_follows, rope_index_function

GRID = (16, 26, 46)  # patches of a clip of 32 frames, before merging 2 × 2: 13 × 23 visual tokens each
VISUAL = 16 * 13 * 23
TEXT, IMAGE, VIDEO = 0, 1, 2
CLIPS = [  # seconds per patch of 5, 10, 16, 30, 60 and 120 s; last temporal position; first text by each rule
    (0.3, 15, 38, 38),
    (0.6, 15, 38, 38),
    (1.0, 45, 46, 38),
    (1.9, 45, 46, 38),
    (3.75, 105, 106, 38),
    (7.5, 225, 226, 38),
]


@pytest.fixture
def model():
    """A model without weights: the numbering reads the configuration alone."""
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": 2})  # as published
    return model


def number(model, seconds, rule, text=15, behind=4):
    types = torch.tensor([[TEXT] * text + [VIDEO] * VISUAL + [TEXT] * behind])
    compute = rope_index_function(model, rule)
    grids = {"video_grid_thw": torch.tensor([GRID]), "second_per_grid_ts": [seconds]}
    positions, deltas = compute(model, torch.zeros_like(types), types, **grids)
    return positions[:, 0], deltas


@pytest.mark.parametrize("seconds, last, text, library", CLIPS)
def test_first_text_behind_a_clip(model, seconds, last, text, library):
    positions, deltas = number(model, seconds, "pretraining")
    stock, jump = number(model, int(seconds), "library")
    behind = 15 + VISUAL
    time = positions[0, 15:behind].reshape(16, 13 * 23)
    step = (last - 15) // 15
    assert torch.equal(time, (15 + step * torch.arange(16))[:, None].expand_as(time)) and time[-1, -1] == last
    assert positions[:, behind:].tolist() == [list(range(text, text + 4))] * 3
    assert torch.equal(positions[:, :behind], stock[:, :behind])
    assert deltas.tolist() == [[text + 4 - (15 + VISUAL + 4)]]
    assert stock[:, behind].tolist() == [library] * 3
    next_token = jump.item() + 15 + VISUAL + 4
    assert next_token == max(last, library + 3) + 1  # where the library's generation goes on: not behind the prompt


def test_the_installed_transformers_needs_the_override(model):
    version = transformers.__version__
    firsts = [number(model, int(seconds), "library")[0][0, 15 + VISUAL].item() for seconds, *_ in CLIPS]
    mended = firsts == [text for _, _, text, _ in CLIPS]
    assert not mended and not library_follows(model), (
        f"transformers {version} lets text go on after the largest position of a video, as in pretraining: say so in "
        "docs/method.md and CHANGELOG.md. If it cuts seconds per patch to whole seconds, too, raise the lower bound in "
        "setup.py to it and remove swim_fast/position_ids.py, swim_fast/modeling/positions.py and model.position_ids"
    )
    time = number(model, 0.5, "library")[0][0, 15 : 15 + VISUAL]
    cut = Version(version) < Version("5.18")
    assert time.unique().tolist() == ([15] if cut else list(range(15, 31))), (
        f"transformers {version} makes other positions of seconds per patch than docs/method.md says; ours are the same"
    )


def test_a_library_that_follows_the_rule_is_recognised(model, monkeypatch):
    monkeypatch.setattr(Qwen2_5_VLModel, "get_rope_index", stock_with_the_rule(Qwen2_5_VLModel.get_rope_index))
    assert library_follows(model)
    for seconds, _, text, _ in CLIPS:  # and our own changes nothing then
        ours, library = (number(model, seconds, rule) for rule in ("pretraining", "library"))
        assert torch.equal(ours[0], library[0]) and torch.equal(ours[1], library[1])
        assert ours[0][0, 15 + VISUAL] == text


def stock_with_the_rule(stock):
    class Stock:
        get_rope_index = stock

    def get_rope_index(self, *args, **kwargs):
        stand_in = Stock()
        stand_in.config, stand_in.get_vision_position_ids = self.config, self.get_vision_position_ids
        return compute_rope_index(stand_in, *args, **kwargs)

    return get_rope_index


def expected_positions(parts, merge=2, rate=2):
    """Number a sequence by the rule in plain loops; parts: (kind, length of text or grid, seconds per patch)."""
    found = []
    for kind, size, seconds in parts:
        start = max(map(max, found), default=-1) + 1
        if kind == TEXT:
            found += [(start + n,) * 3 for n in range(size)]
        else:
            t, h, w = size
            step = rate * int(seconds) if kind == VIDEO else 1
            cells = itertools.product(range(t), range(h // merge), range(w // merge))
            found += [(start + step * a, start + b, start + c) for a, b, c in cells]
    return torch.tensor(found).T


SAMPLES = [
    [(TEXT, 5, 0), (VIDEO, (4, 6, 4), 7.5), (TEXT, 3, 0), (VIDEO, (3, 4, 10), 0.6), (TEXT, 2, 0)],
    [(TEXT, 1, 0), (IMAGE, (1, 8, 6), 0), (TEXT, 1, 0), (VIDEO, (4, 4, 4), 3.75), (TEXT, 4, 0), (IMAGE, (1, 4, 4), 0)],
    [(TEXT, 2, 0), (VIDEO, (5, 4, 4), 2.0), (IMAGE, (1, 4, 8), 0), (TEXT, 7, 0)],  # no text between
    [(TEXT, 9, 0)],
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_with_several_videos_and_images(model, side):
    positions = [expected_positions(parts) for parts in SAMPLES]
    longest = max(p.shape[1] for p in positions)
    types, mask = torch.zeros(2, len(SAMPLES), longest, dtype=torch.long)
    for row, parts in enumerate(SAMPLES):
        kinds = [[kind] * (size if kind == TEXT else size[0] * size[1] * size[2] // 4) for kind, size, _ in parts]
        values = torch.tensor(sum(kinds, []))
        slots = slice(longest - len(values), None) if side == "left" else slice(len(values))
        types[row, slots], mask[row, slots] = values, 1
    media = [part for parts in SAMPLES for part in parts]
    found, deltas = compute_rope_index(
        model,
        torch.zeros_like(types),
        types,
        image_grid_thw=torch.tensor([size for kind, size, _ in media if kind == IMAGE]),
        video_grid_thw=torch.tensor([size for kind, size, _ in media if kind == VIDEO]),
        second_per_grid_ts=torch.tensor([seconds for kind, _, seconds in media if kind == VIDEO]),
        attention_mask=mask,
    )
    for row, expected in enumerate(positions):
        assert torch.equal(found[:, row, mask[row].bool()], expected)
        assert deltas[row].item() == expected.max() + 1 - expected.shape[1]
    assert not found[:, mask == 0].any()
