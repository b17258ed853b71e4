"""Noun attention on a tiny stock Qwen2.5-VL."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from swim_fast.families import get_attentions, get_default_layers
from swim_fast.modeling import attach_noun_attention, detach_noun_attention
from swim_fast.modeling.noun_attention import get_attached_layers
from swim_kernels import NounQueries

LENGTHS = (37, 29)  # second sequence is padded on the right
GRID = (2, 4, 6)  # temporal patches and patches before 2 × 2 merging
VISUAL = range(5, 5 + 2 * 2 * 3)


@pytest.fixture
def inputs(stock):
    generator = torch.Generator().manual_seed(1)
    length = max(LENGTHS)
    ids = torch.randint(20, 250, (2, length), generator=generator)
    ids[:, VISUAL.start : VISUAL.stop] = stock.config.video_token_id
    types = (ids == stock.config.video_token_id).int() * 2
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    pixels = torch.randn(2 * 2 * 4 * 6, 3 * 2 * 14 * 14, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "mm_token_type_ids": types,
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([GRID, GRID]),
        "second_per_grid_ts": [1.0, 1.0],
    }


def queries(window=None):
    position = torch.tensor([30, 33, 25])
    return NounQueries(
        sequence=torch.tensor([0, 0, 1]),
        position=position,
        key_start=torch.zeros(3, dtype=torch.long) if window is None else (position + 1 - window).clamp(min=0),
        key_end=position + 1,
        key_set=torch.tensor([0, 0, 1]),
        key_sets=torch.tensor([list(VISUAL), list(VISUAL)]),
    )


def eager_rows(model, inputs, layer):
    """Rows of the model's own eager attention probabilities, head mean, at the visual keys."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions[layer].float().mean(1)
    q = queries()
    return weights[q.sequence, q.position][:, VISUAL.start : VISUAL.stop]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_maps_are_the_models_own_attention(model, inputs, attention):
    model.set_attn_implementation(attention)
    expected = [eager_rows(model, inputs, layer) for layer in (0, 2)]
    plain = model(**inputs)
    attach_noun_attention(model, [2, 0])
    outputs = model(**inputs, noun_queries=queries())
    assert len(outputs.attentions) == 2
    for found, truth in zip(outputs.attentions, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    assert torch.equal(outputs.logits, plain.logits)


def test_without_queries_the_model_is_as_before(model, inputs):
    plain = model(**inputs)
    attach_noun_attention(model, [1])
    again = model(**inputs)
    assert torch.equal(plain.logits, again.logits)
    assert again.attentions is None
    model.set_attn_implementation("eager")
    assert model(**inputs, output_attentions=True).attentions[1].shape == (2, 4, 37, 37)


def test_loss_and_labels_go_on_working(model, inputs):
    attach_noun_attention(model, [1])
    outputs = model(**inputs, labels=inputs["input_ids"], noun_queries=queries())
    assert torch.equal(outputs.loss, model(**inputs, labels=inputs["input_ids"]).loss)


def test_the_last_attention_set_computes_the_output(model, inputs):
    attach_noun_attention(model, [0])
    model.set_attn_implementation("eager")
    eager = model(**inputs, noun_queries=queries()).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**inputs, noun_queries=queries()).logits, eager, rtol=1e-4, atol=1e-5)


def test_the_wrapped_attention_sees_its_own_name_and_no_queries(model, inputs):
    """What flash attention needs: it loads its kernels by the name in `module.config`."""
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.layer_idx, "noun_queries" in kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("fake_flash_attention", flash)
    model.model.language_model.config._attn_implementation_internal = "fake_flash_attention"
    attach_noun_attention(model, [0])
    maps = model(**inputs, noun_queries=queries()).attentions
    assert len(maps) == 1 and maps[0].shape == (3, len(VISUAL))
    assert seen == [("fake_flash_attention", layer, False) for layer in range(4)]


def gradients(model, inputs, upstream):
    model.zero_grad()
    outputs = model(**inputs, noun_queries=queries())
    loss = sum((m * u).sum() for m, u in zip(outputs.attentions, upstream, strict=True)) + outputs.logits.mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_survive_activation_checkpointing(model, inputs):
    attach_noun_attention(model, [0, 3]).train()
    upstream = torch.randn(2, 3, len(VISUAL), generator=torch.Generator().manual_seed(2))
    plain = gradients(model, inputs, upstream)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model, inputs, upstream)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert (gradients(model, inputs, 0 * upstream)[name] - plain[name]).abs().max() > 0


def test_reentrant_checkpointing_is_refused(model, inputs):
    attach_noun_attention(model, [0]).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant.*False"):
        model(**inputs, noun_queries=queries())
    model(**inputs)  # without maps it is the user's affair
    model.eval()(**inputs, noun_queries=queries())  # and so it is where nothing is checkpointed


def test_generation_with_queries_is_refused(model, inputs):
    attach_noun_attention(model, [0])
    one = {k: v[:1] for k, v in inputs.items()} | {"pixel_values_videos": inputs["pixel_values_videos"][:48]}
    assert model.generate(**one, max_new_tokens=2).shape[1] == 39
    with pytest.raises(ValueError, match="noun_queries"):  # transformers' own check of keyword arguments
        model.generate(**one, max_new_tokens=2, noun_queries=queries())
    with pytest.raises(ValueError, match="noun_queries cannot be used while generating"):
        model(**inputs, past_key_values=DynamicCache(config=model.config), noun_queries=queries())


@pytest.mark.parametrize(
    ("layers", "message"), [([4], "layer 4 is out of range.*0 … 3"), ([-5], "out of range"), ([1, -3], "twice")]
)
def test_layers_are_checked(model, layers, message):
    with pytest.raises(ValueError, match=message):
        attach_noun_attention(model, layers)


def test_default_layers_are_the_papers():
    assert get_default_layers(range(28)) == [2, 7, 12, 17, 22, 27]
    assert get_default_layers(range(4)) == [3]


def test_family_without_adapter_is_named():
    class Other(nn.Module):
        config = type("Config", (), {"model_type": "llama"})()

    with pytest.raises(ValueError, match="no adapter for model type 'llama'; supported: .*qwen2_5_vl"):
        attach_noun_attention(Other())


def test_base_model_without_head_is_refused(model):
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        attach_noun_attention(model.model)


def test_attach_again_and_detach(model, inputs):
    plain = model(**inputs).logits
    attach_noun_attention(model, [0])
    attach_noun_attention(model, [1, 2])
    assert get_attached_layers(model) == [1, 2]
    assert len(model(**inputs, noun_queries=queries()).attentions) == 2
    detach_noun_attention(model)
    detach_noun_attention(model)
    assert get_attached_layers(model) == []
    assert all(module.config is model.config.text_config for module in get_attentions(model))
    assert torch.equal(model(**inputs).logits, plain)


def test_sliding_window_raises_key_start(model, inputs):
    attach_noun_attention(model, [1])
    for module in get_attentions(model):
        module.sliding_window = 28
    windowed = model(**inputs, noun_queries=queries()).attentions[0]
    for module in get_attentions(model):
        module.sliding_window = None
    expected = model(**inputs, noun_queries=queries(window=28)).attentions[0]
    # the layers' outputs are the same: stock sdpa takes the window from the mask, which has none here
    assert torch.equal(windowed, expected)
    assert not torch.equal(windowed, model(**inputs, noun_queries=queries()).attentions[0])


def test_two_models_do_not_disturb_each_other(stock, inputs):
    first, second = copy.deepcopy(stock), copy.deepcopy(stock)
    attach_noun_attention(first, [0])
    assert second(**inputs).attentions is None
    assert get_attached_layers(second) == []
    assert get_attached_layers(copy.deepcopy(first)) == [0]


def test_saved_checkpoint_is_plain(model, inputs, tmp_path):
    attach_noun_attention(model, [1])
    model.save_pretrained(tmp_path)
    assert "swim" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    code = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as A; "
        f"m = A.from_pretrained({str(tmp_path)!r}); ids = torch.arange(30, 40)[None]; "
        "print(m.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=3).shape[1]); "
        "assert not [n for n in sys.modules if n.startswith('swim')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 11 <= int(done.stdout) <= 13


def test_no_rows_give_empty_maps_with_a_graph(model, inputs):
    attach_noun_attention(model, [0])
    none = torch.zeros(0, dtype=torch.long)
    empty = NounQueries(none, none, none, none, none, torch.zeros(0, 0, dtype=torch.long))
    maps = model(**inputs, noun_queries=empty).attentions
    assert maps[0].shape == (0, 0)
    maps[0].sum().backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() == 0
