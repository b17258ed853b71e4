"""The rule of position ids on a model: generation, copies, checkpoints, families, and what the log says."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLModel

from swim_fast.modeling.positions import restore_position_rule, set_position_rule
from swim_fast.modeling.prepare import prepare_model, restore_model
from swim_fast.position_ids import compute_rope_index

SECONDS = [7.5, 3.75]
PATCHES = 6


@pytest.fixture
def inputs(stock):
    """Two questions behind a video each, padded on the left; after merging, patches are 2 × 2 and 1 × 3 tokens."""
    generator = torch.Generator().manual_seed(1)
    config, grids = stock.config, [(PATCHES, 4, 4), (PATCHES, 2, 6)]
    rows, types = [], []
    for (t, h, w), before, behind in zip(grids, (4, 3), (9, 5), strict=True):
        kinds = torch.tensor([0] * before + [2] * (t * h * w // 4) + [0] * behind)
        ids = torch.randint(20, 250, kinds.shape, generator=generator)
        rows.append(ids.masked_fill(kinds > 0, config.video_token_id))
        types.append(kinds)
    longest = max(map(len, rows))
    pad = [(longest - len(row), 0) for row in rows]
    pixels = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(r, p, value=19) for r, p in zip(rows, pad, strict=True)]),
        "mm_token_type_ids": torch.stack([torch.nn.functional.pad(r, p) for r, p in zip(types, pad, strict=True)]),
        "attention_mask": torch.stack(
            [torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pad, strict=True)]
        ),
        "pixel_values_videos": torch.randn(sum(t * h * w for t, h, w in grids), pixels, generator=generator),
        "video_grid_thw": torch.tensor(grids),
        "second_per_grid_ts": SECONDS,
    }


def extended(inputs, tokens):
    """The same inputs with tokens behind each row."""
    more = {"input_ids": tokens, "mm_token_type_ids": 0 * tokens, "attention_mask": 0 * tokens + 1}
    return inputs | {name: torch.cat([inputs[name], value], dim=1) for name, value in more.items()}


def generate(model, inputs, steps=4):
    """Tokens [B, steps] and logits [B, steps, vocabulary] of greedy generation with a key/value cache."""
    found = model.generate(
        **inputs, min_new_tokens=steps, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True
    )
    return found.sequences[:, -steps:], torch.stack(found.logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_continues_as_one_forward_over_all_tokens(model, inputs, attention):
    model.set_attn_implementation(attention)
    _, library = generate(model, inputs)
    set_position_rule(model, "pretraining")
    tokens, logits = generate(model, inputs)
    whole = model(**extended(inputs, tokens), use_cache=False).logits
    steps = slice(inputs["input_ids"].shape[1] - 1, -1)
    torch.testing.assert_close(logits, whole[:, steps], rtol=1e-4, atol=1e-5)
    assert (logits - library).abs().max() > 1e-2, "the two rules give the same"
    # A later forward with the cache's own position ids, and one row alone, too.
    alone = {k: v[:1] for k, v in inputs.items() if k != "pixel_values_videos"}
    alone["pixel_values_videos"] = inputs["pixel_values_videos"][: PATCHES * 16]
    torch.testing.assert_close(generate(model, alone)[1], logits[:1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generated_tokens_are_numbered_on(model, inputs):
    set_position_rule(model, "pretraining")
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][-3:]), with_kwargs=True
    )
    generate(model, inputs, steps=3)
    prompt, *steps = seen
    for row, (seconds, before, behind) in enumerate(zip(SECONDS, (4, 3), (9, 5), strict=True)):
        last = before + 2 * int(seconds) * (PATCHES - 1)  # of the video
        assert prompt[:, row, -behind:].tolist() == [list(range(last + 1, last + 1 + behind))] * 3
        for number, step in enumerate(steps):
            assert step[:, row].tolist() == [[last + 1 + behind + number]] * 3


def test_only_one_model_changes_and_a_copy_has_its_own(model, stock, inputs):
    stock_method = Qwen2_5_VLModel.get_rope_index
    set_position_rule(model, "pretraining")
    assert Qwen2_5_VLModel.get_rope_index is stock_method and "get_rope_index" not in vars(stock.model)
    copied = copy.deepcopy(model)
    assert copied.model.get_rope_index.__self__ is copied.model
    restore_position_rule(model)
    assert "get_rope_index" not in vars(model.model)
    assert copied.model.get_rope_index.__func__ is compute_rope_index
    set_position_rule(copied, "library")
    assert "get_rope_index" not in vars(copied.model)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["pretraining", "library"])
def test_preparation_sets_the_rule_and_its_removal_leaves_none(model, stock, inputs, rule):
    expected = set_position_rule(copy.deepcopy(stock), rule)(**inputs).logits
    prepare_model(model, frozen=["vision_tower"], position_ids=rule)
    torch.testing.assert_close(model(**inputs, logits_to_keep=0).logits, expected, rtol=1e-4, atol=1e-5)
    plain = restore_model(model)
    assert "get_rope_index" not in vars(plain.model)
    assert torch.equal(plain(**inputs).logits, stock(**inputs).logits)


def test_a_saved_checkpoint_is_plain(model, stock, tmp_path):
    set_position_rule(model, "pretraining").save_pretrained(tmp_path / "with")
    stock.save_pretrained(tmp_path / "without")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("with", "without")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert "position_ids" not in json.loads((tmp_path / "with" / "config.json").read_text())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "with")
    assert "get_rope_index" not in vars(loaded.model)


def test_the_log_says_which_rule_is_in_force(model, monkeypatch, caplog):
    def said(rule="pretraining"):
        caplog.clear()
        with caplog.at_level("INFO", "swim_fast"):
            set_position_rule(model, rule)
        (message,) = [record.getMessage() for record in caplog.records if "position ids" in record.getMessage()]
        return message

    assert "by the rule of pretraining, text goes on after the largest position" in said()
    assert "as transformers numbers them, which is not the rule of pretraining" in said("library")
    monkeypatch.setattr("swim_fast.modeling.positions.library_follows", lambda module: True)
    for rule in ("pretraining", "library"):
        assert "which the installed transformers follows by itself" in said(rule)
    assert "get_rope_index" not in vars(model.model)
    model.config.model_type = "another"
    assert "known for Qwen2-VL, Qwen2.5-VL only" in said()
