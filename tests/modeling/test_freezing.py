import pytest
import torch

from swim_fast.demo.tiny_model import build_model, train_tokenizer
from swim_fast.modeling.freezing import freeze, keep_visual_in_step


@pytest.fixture
def model():
    return build_model(train_tokenizer(["a dog and a cat"] * 4, 300), seed=0)


def trainable(model):
    return {name.split(".")[1] if name.startswith("model") else name.split(".")[0] for name, p in _trained(model)}


def _trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_vision_tower_goes_without_its_merger(model):
    freeze(model, ["vision_tower"])
    visual = [name for name, _ in _trained(model) if ".visual." in name]
    assert visual and all(".merger." in name for name in visual)


def test_language_model_takes_its_head_along(model):
    freeze(model, ["language_model"])
    assert trainable(model) == {"visual"}


def pixels(model):
    return torch.randn(4, 3 * 2 * 14 * 14), torch.tensor([[1, 2, 2]])


def test_a_wholly_frozen_visual_module_makes_no_graph(model):
    freeze(model, ["vision_tower", "merger"])
    values, grid = pixels(model)
    values.requires_grad_()  # would make one otherwise
    assert not model.model.visual(values, grid_thw=grid).pooler_output.requires_grad


@pytest.mark.parametrize(
    ("parts", "message"),
    [(["eyes"], "cannot freeze 'eyes'"), (["vision_tower", "merger", "language_model"], "nothing to train")],
)
def test_mistakes_are_named(model, parts, message):
    with pytest.raises(ValueError, match=message):
        freeze(model, parts)


def test_text_batches_touch_every_visual_parameter(model):
    ids = torch.arange(30, 38)[None]
    before = model(input_ids=ids).logits
    keep_visual_in_step(model)
    after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.visual.parameters())


def test_video_batches_pass_the_visual_module_once(model):
    keep_visual_in_step(model)
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    values, grid = pixels(model)
    ids = torch.tensor([[30, model.config.video_token_id, 31, 32]])
    types = (ids == model.config.video_token_id).int() * 2
    for _ in range(2):
        model(input_ids=ids, mm_token_type_ids=types, pixel_values_videos=values, video_grid_thw=grid)
    assert len(calls) == 2
    model(input_ids=ids[:, 2:])
    assert len(calls) == 3
