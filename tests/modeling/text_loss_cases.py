"""Batches, heads and comparisons that the tests of the text loss share."""

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

LENGTH = 23


def untied(model, bias=True):
    generator = torch.Generator().manual_seed(5)
    old = model.lm_head
    model.lm_head = nn.Linear(old.in_features, old.out_features, bias=bias)
    with torch.no_grad():
        for parameter in model.lm_head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    model.config.tie_word_embeddings = False
    return model


def batch(kind):
    """Two padded sequences, or two packed into one row; labels on some tokens of each."""
    ids = torch.randint(20, 250, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :7] = -100
    labels[0, 12:15] = -100
    labels[1, 17:] = -100
    if kind == "padded":
        labels[0, 0] = ids[0, 0]  # never predicted
        return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < torch.tensor([[23], [17]])).long()}, labels
    positions = torch.cat([torch.arange(LENGTH), torch.arange(17)])[None]
    ids, labels = (torch.cat([t[0], t[1, :17]])[None] for t in (ids, labels))
    return {"input_ids": ids, "position_ids": positions.expand(4, 1, -1)}, labels


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(model, inputs, labels):
    vocabulary = model.config.get_text_config().vocab_size
    return ForCausalLMLoss(model(**inputs).logits, labels, vocabulary, num_items_in_batch=1)


def assert_same(mine, theirs, tolerance=1e-4):
    assert mine.keys() == theirs.keys()
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():  # those of key biases are rounding alone
        assert (mine[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6 * largest, name
