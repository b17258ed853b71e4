"""The text loss in the head's place, on a tiny stock Qwen2.5-VL."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory import count_allocations, watch_saved
from swim_fast.modeling import text_loss
from swim_fast.modeling.text_loss import attach_text_loss, count_labels, detach_text_loss
from tests.modeling.text_loss_cases import assert_same, batch, gradients, plain_loss, untied
from tests.training.text_loss_ranks import Adapted


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("head", ["tied", "untied", "bias"])
@pytest.mark.parametrize("size", [50, 1000, 2**25])
def test_equals_the_loss_of_all_logits(model, kind, head, size):
    if head != "tied":
        untied(model, bias=head == "bias")
    inputs, labels = batch(kind)
    expected = plain_loss(model, inputs, labels)
    theirs = gradients(model, expected)
    assert ("lm_head.weight" in theirs) is (head != "tied")
    attach_text_loss(model, block_logits=size)
    loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, loss), theirs)


def test_labels_are_counted_as_they_are_summed(model):
    _, labels = batch("padded")
    assert count_labels(labels) == (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("head", ["tied", "wrapped"])
def test_no_label_gives_zero_with_a_graph(model, head):
    if head == "wrapped":
        model.lm_head = Adapted(model.lm_head)
    inputs, labels = batch("padded")
    attach_text_loss(model)
    loss = model(**inputs, labels=labels.fill_(-100), num_items_in_batch=1).loss
    found = gradients(model, loss)
    assert loss == 0 and not any(gradient.any() for gradient in found.values())
    if head == "wrapped":
        assert found.pop("lm_head.down.weight") is not None and found.pop("lm_head.up.weight") is not None
        found = {name.replace("lm_head.base_layer", "lm_head"): gradient for name, gradient in found.items()}
    language = [name for name, _ in model.named_parameters() if "visual" not in name and "lm_head" not in name]
    assert set(language) <= set(found)  # all ranks reduce the same


@pytest.mark.parametrize("size", [1000, 2**25])  # chunks of 3 tokens, and one
def test_a_head_wrapped_after_attaching(model, log, size):
    attach_text_loss(model, block_logits=size)
    torch.manual_seed(0)
    model.lm_head = Adapted(model.lm_head)
    inputs, labels = batch("padded")
    expected = plain_loss(model, inputs, labels)
    theirs = gradients(model, expected)
    with watch_saved(model.parameters()) as saved:
        loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
    vocabulary = model.config.get_text_config().vocab_size
    assert saved.shapes() and not [shape for shape, _ in saved.shapes() if vocabulary in shape]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, loss), theirs)
    assert "checkpointed chunks of Adapted" in log.text


@pytest.mark.needs("peft")
def test_a_head_with_a_low_rank_adapter(model):
    """peft's wrapper of the whole model, too, which calls the model inside."""
    import peft

    inputs, labels = batch("padded")
    attach_text_loss(untied(model, bias=False), block_logits=1000)
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    assert type(model.lm_head) is not nn.Linear
    expected = plain_loss(adapted, inputs, labels)
    theirs = gradients(adapted, expected)
    loss = adapted(**inputs, labels=labels, num_items_in_batch=1).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(adapted, loss), theirs)
    assert any("lm_head.lora_B" in name for name in theirs)
    assert adapted(**inputs).logits.ndim == 3


def test_a_frozen_head_and_a_frozen_model(model):
    untied(model)
    inputs, labels = batch("padded")
    theirs = gradients(model, plain_loss(model, inputs, labels))
    attach_text_loss(model)
    model.lm_head.requires_grad_(False)
    mine = gradients(model, model(**inputs, labels=labels, num_items_in_batch=1).loss)
    assert_same(mine, {name: gradient for name, gradient in theirs.items() if "lm_head" not in name})
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    mine = gradients(model, model(**inputs, labels=labels, num_items_in_batch=1).loss)
    assert_same(mine, {name: gradient for name, gradient in theirs.items() if "lm_head" in name})


def test_activation_checkpointing_and_autocast(model):
    inputs, labels = batch("padded")
    model.train()
    attach_text_loss(model, block_logits=1000)
    theirs = gradients(model, model(**inputs, labels=labels, num_items_in_batch=1).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, model(**inputs, labels=labels, num_items_in_batch=1).loss), theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
        detached = detach_text_loss(copy.deepcopy(model))
        expected = plain_loss(detached, inputs, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_bf16(model):
    inputs, labels = batch("padded")
    model.bfloat16()
    expected = plain_loss(model, inputs, labels)
    theirs = gradients(model, expected)
    attach_text_loss(model, block_logits=1000)
    loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    mine = gradients(model, loss)
    truth = torch.cat([gradient.flatten().float() for gradient in theirs.values()])
    assert (torch.cat([mine[name].flatten().float() for name in theirs]) - truth).norm() <= 2e-2 * truth.norm()


def test_memory_does_not_grow_with_the_length(model):
    """What the head and the loss take; the same 20 labels among 200 or 1600 tokens."""
    width, vocabulary, labelled, size = 128, 4000, 20, 1500
    model.lm_head = head = nn.Linear(width, vocabulary, bias=False)
    attach_text_loss(model, block_logits=size)
    for length in (200, 1600):
        labels = torch.full((1, length), -100)
        labels[0, -labelled:] = 30
        with torch.no_grad():
            hidden = model.model(input_ids=torch.full((1, length), 25)).last_hidden_state
        hidden.requires_grad_()
        with (
            text_loss._loss_at_head(model, {"labels": labels}),
            watch_saved((hidden, head.weight)) as saved,
            count_allocations() as counted,
        ):
            loss = head(hidden)
            counted.mark("forward")
            kept = saved.bytes
            loss.backward()
        head.weight.grad = None
        rows = labelled * width * 4
        of_length = length * (width * 4 + 32)  # the hidden states' gradient; labels shifted, compared
        assert counted.held["forward"] <= rows + labelled * 32 + 2048
        assert rows <= kept <= rows + labelled * 32
        assert counted.peak - of_length - head.weight.numel() * 4 <= 6 * rows + 8 * size * 4 < labelled * vocabulary * 4


def test_without_labels_the_model_is_as_before(model, stock):
    inputs, labels = batch("padded")
    one = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    plain, words = stock(**inputs).logits, stock.generate(**one, max_new_tokens=6)
    attach_text_loss(model)
    assert torch.equal(model(**inputs).logits, plain)
    model(**inputs, labels=labels)
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model.generate(**one, max_new_tokens=6), words)
    assert model.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(7)}])
def test_the_loss_is_the_stock_models(model, stock, items):
    """The mean over the labels, or their sum divided by transformers' number of items; by position, all logits too."""
    inputs, labels = batch("padded")
    expected = stock(**inputs, labels=labels, **items)
    found = attach_text_loss(model)(**inputs, labels=labels, **items)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    assert found.logits.ndim == 0
    by_position = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, labels, **items)
    assert torch.equal(by_position.loss, expected.loss) and torch.equal(by_position.logits, expected.logits)


def test_the_number_of_items_does_not_reach_the_vision_tower(model):
    attach_text_loss(model)
    vision = model.config.vision_config
    pixels = torch.randn(16, 3 * vision.temporal_patch_size * vision.patch_size**2)
    ids = torch.tensor([[30, *[model.config.image_token_id] * 4, 31]])
    seen = []
    model.model.visual.blocks[0].register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    model(
        input_ids=ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        labels=ids,
        num_items_in_batch=1,
    )
    assert len(seen) == 1 and "num_items_in_batch" not in seen[0]


def test_attach_again_detach_and_copies(model):
    inputs, labels = batch("padded")
    attach_text_loss(model, block_logits=1)
    attach_text_loss(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    mine, theirs = (m(**inputs, labels=labels, num_items_in_batch=1).loss for m in (model, copied))
    assert theirs.item() == pytest.approx(plain_loss(copied, inputs, labels).item(), rel=1e-5)
    assert mine.item() == pytest.approx(plain_loss(model, inputs, labels).item(), rel=1e-5) and mine != theirs
    detach_text_loss(model)
    detach_text_loss(model)
    assert model(**inputs).logits.ndim == 3
    assert not any(name in vars(model) for name in ("forward", "_text_loss", "_loss_function", "_contexts"))
    assert not [name for name in vars(model.model.language_model) if "keyword" in name]
    assert "forward" not in vars(model.lm_head) and not model.model.visual._forward_pre_hooks


def test_a_call_that_never_reaches_the_head_leaves_it_as_it_was(model):
    inputs, labels = batch("padded")
    plain = model(**inputs).logits
    attach_text_loss(model)
    failing = model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, labels=labels)
    failing.remove()
    assert torch.equal(model(**inputs).logits, plain)


def test_a_head_with_a_forward_of_its_own_keeps_it(model):
    """As `accelerate` gives to modules whose weights it moves about."""
    inputs, labels = batch("padded")
    expected = plain_loss(model, inputs, labels)
    calls = []

    def forward(hidden):
        calls.append(hidden.shape)
        return F.linear(hidden, model.lm_head.weight)

    model.lm_head.forward = forward
    attach_text_loss(model)
    loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert calls == [(count_labels(labels), 128)] and model.lm_head.forward is forward


def test_labels_must_fit_the_hidden_states(model):
    inputs, labels = batch("padded")
    attach_text_loss(model)
    with pytest.raises(ValueError, match=r"labels are \[2, 23\].*\[2, 4\].*no logits_to_keep"):
        model(**inputs, labels=labels, logits_to_keep=4)
