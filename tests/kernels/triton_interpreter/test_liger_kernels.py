"""Liger's own kernels where this project calls them: those of its kernels that the interpreter can run.

Those of RMSNorm and SwiGLU take numbers in a way it does not know.
"""

import copy

import pytest
import torch

from swim_fast.demo.tiny_model import ModelSize, build_model, train_tokenizer
from swim_fast.modeling import attach_noun_attention, liger
from swim_fast.modeling.liger import apply_liger
from swim_fast.modeling.text_loss import attach_text_loss
from swim_kernels import NounQueries

pytestmark = [pytest.mark.interpreter, pytest.mark.needs("liger_kernel")]


@pytest.fixture
def models():
    """Stock and to be changed, both attached."""
    model = build_model(train_tokenizer(["a dog and a cat"] * 4, 300), ModelSize(num_layers=4), seed=0)
    attach_text_loss(attach_noun_attention(model, [0, 3], backend="torch"), block_logits=7 * 300)
    return model, copy.deepcopy(model)


def results(model):
    ids = torch.randint(20, 250, (2, 19), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :6] = -100
    labels[1, 14:] = -100
    rows, keys = torch.tensor([0, 1, 1]), torch.arange(2, 8)
    queries = NounQueries(rows, rows + 12, rows * 0, rows + 13, rows, torch.stack([keys, keys]))
    outputs = model(input_ids=ids, labels=labels, num_items_in_batch=1, noun_queries=queries)
    (3 * outputs.loss + sum((m * m).sum() for m in outputs.attentions)).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), "first map": outputs.attentions[0].detach(), **trained}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert (found[name] - truth).norm() <= 1e-4 * truth.norm() + 1e-4, name


def test_the_fused_cross_entropy_is_the_text_loss(models, monkeypatch):
    stock, model = models
    expected = results(stock)
    monkeypatch.setattr(liger, "get_refusal", lambda device_type: None)
    called = []
    monkeypatch.setattr("swim_fast.modeling.text_loss.linear_cross_entropy_sum", called.append)
    assert_same(results(model), expected)
    assert not called


def test_the_rotary_embedding_in_every_layer_with_its_maps(models, monkeypatch):
    stock, model = models
    expected = results(stock)
    for other in ("_is_rms_norm", "_is_swiglu"):
        monkeypatch.setattr(liger, other, lambda module: False)
    assert apply_liger(model, "cuda") == ["language model: rotary embedding × 4"]
    monkeypatch.setattr("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.apply_rotary_pos_emb", None)  # not called
    assert_same(results(model), expected)
