"""Activations that wait on the host: which they are, and that gradients do not notice."""

import copy

import pytest
import torch
from torch import nn

from swim_fast.modeling import attach_noun_attention, offload
from swim_fast.modeling.offload import OnHost, offload_activations, to_device, to_host
from swim_kernels import NounQueries


def saved(compute):
    """What `to_host` is given by autograd, and what it makes of it."""
    pairs = []

    def pack(tensor):
        pairs.append((tensor, to_host(tensor)))
        return pairs[-1][1]

    with torch.autograd.graph.saved_tensors_hooks(pack, to_device):
        result = compute()
    return result, pairs


def test_large_activations_go_and_weights_stay():
    linear, frozen = nn.Linear(512, 1024), nn.Linear(1024, 512)
    frozen.requires_grad_(False)
    inputs = torch.randn(1500, 512, requires_grad=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result, pairs = saved(lambda: frozen(linear(inputs * 2)).square() * torch.ones(1500, 512).cumsum(1))
        gone = [tuple(tensor.shape) for tensor, kept in pairs if isinstance(kept, OnHost)]
        stayed = {tuple(tensor.shape) for tensor, kept in pairs if not isinstance(kept, OnHost)}
        assert gone == [(1500, 512)] * 2  # the input of the first layer, and what is squared
        assert stayed == {(512, 1024), (1024, 512), (1500, 512)}  # both weights, and the factor, which has no gradient
        result.float().sum().backward()


def test_what_comes_back_is_the_same():
    tensor = torch.randn(700, 600, requires_grad=True).t() * 1.0
    kept = to_host(tensor)
    assert isinstance(kept, OnHost) and kept.tensor.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    back = to_device(kept)
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.device == tensor.device
    small = tensor[:3].clone()
    assert to_host(small) is small


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_the_same_bits(stock, monkeypatch, checkpointing, attention):
    monkeypatch.setattr(offload, "SMALLEST", 1)  # checkpointing may save empty tensors beside the inputs
    ids = torch.randint(20, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    position = torch.tensor([20, 23, 17])
    queries = NounQueries(
        sequence=torch.tensor([0, 0, 1]),
        position=position,
        key_start=torch.zeros(3, dtype=torch.long),
        key_end=position + 1,
        key_set=torch.zeros(3, dtype=torch.long),
        key_sets=torch.arange(3, 12)[None],
    )
    gone = []
    monkeypatch.setattr(offload, "to_host", lambda tensor: gone.append(to_host(tensor)) or gone[-1])
    found = []
    for offloaded in (False, True):
        model = copy.deepcopy(stock).train()
        model.set_attn_implementation({"text_config": attention})
        attach_noun_attention(model, layers=[1, 3])
        if offloaded:
            offload_activations(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        outputs = model(input_ids=ids, noun_queries=queries)
        loss = outputs.logits.square().mean() + sum(m.log().square().mean() for m in outputs.attentions)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (other, others) = found
    assert torch.equal(loss, other) and grads.keys() == others.keys() and len(grads) > 40
    assert all(torch.equal(grads[name], others[name]) for name in grads)
    taken = [kept for kept in gone if isinstance(kept, OnHost)]
    width = stock.config.text_config.hidden_size
    inputs = [kept for kept in taken if kept.tensor.shape == (2, 24, width)]
    assert len(inputs) >= 4  # of each layer at least
    if checkpointing:  # and, beside them, only what the last norm saves
        assert len(taken) < 12
    else:
        assert len(taken) > 40


def test_an_error_in_the_decoder_leaves_no_hooks_behind(stock):
    model = copy.deepcopy(stock)
    offload_activations(model)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model.model.language_model()
    leaf = torch.randn(600, 600, requires_grad=True)
    assert (leaf * leaf).grad_fn._saved_self is leaf
