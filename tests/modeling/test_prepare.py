"""All changes to a model at once: the losses they leave, that they can be undone, and that a copy has its own."""

import copy

import pytest
import torch

from swim_fast.errors import MissingLibraryError, OptionError
from swim_fast.modeling import liger
from swim_fast.modeling.adapters import get_peft_refusal
from swim_fast.modeling.prepare import prepare_model, restore_model
from swim_fast.options import Lora
from swim_kernels import NounQueries

EVERYTHING = {
    "liger": True,
    "lora": Lora(rank=2),
    "frozen": ["vision_tower", "merger"],
    "layers": [1, 3],
    "packed": True,
    "activation_offload": True,
    "ranks": 2,
}


@pytest.fixture
def batch():
    ids = torch.randint(20, 250, (1, 21), generator=torch.Generator().manual_seed(1))
    position = torch.tensor([12, 20])
    zeros = torch.zeros(2, dtype=torch.long)
    queries = NounQueries(zeros, position, zeros, position + 1, zeros, torch.arange(3, 9)[None])
    return {"input_ids": ids, "labels": ids}, queries


def describe(model):
    """Everything that a change may leave on a model: modules, their attributes and hooks, what is trained."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    attributes = {
        name: (type(m), sorted(vars(m)), [len(getattr(m, hook)) for hook in hooks]) for name, m in model.named_modules()
    }
    return attributes, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.needs("peft")
def test_everything_can_be_undone(model, batch, monkeypatch):
    monkeypatch.setattr(liger, "get_refusal", lambda device_type: None)
    inputs, queries = batch
    model.model.visual.merger.requires_grad_(False)
    before, expected = describe(model), model(**inputs)
    assert describe(restore_model(model)) == before  # nothing to undo
    prepare_model(model, **EVERYTHING)
    changed, trained = describe(model)
    assert changed != before[0] and {name for name, on in trained.items() if on} == {n for n in trained if "lora_" in n}
    restore_model(model)
    assert describe(model) == before
    found = model(**inputs)
    assert torch.equal(found.logits, expected.logits) and found.loss == expected.loss and found.attentions is None


@pytest.mark.needs("peft")
def test_loss_and_maps_are_those_of_the_stock_model(model, stock, batch):
    inputs, queries = batch
    prepare_model(model, **EVERYTHING)  # Liger needs CUDA, and new adapters add zero
    outputs = model(**inputs, noun_queries=queries)
    torch.testing.assert_close(outputs.loss, stock(**inputs).loss, rtol=1e-6, atol=0)
    assert [found.shape for found in outputs.attentions] == [(2, 6)] * 2
    outputs.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_copy_has_its_own_changes(model, stock, batch):
    inputs, _ = batch
    prepare_model(model, frozen=["vision_tower", "merger"], activation_offload=True, ranks=2)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.testing.assert_close(copied(**inputs).loss, stock(**inputs).loss, rtol=1e-6, atol=0)
    restore_model(model)
    assert copied(**inputs).logits.ndim == 0
    plain = restore_model(copied)
    assert describe(plain) == describe(stock) and torch.equal(plain(**inputs).logits, stock(**inputs).logits)


@pytest.mark.needs("peft")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, "layer 4 is out of range"),
        ({"frozen": ["heart"]}, "cannot freeze 'heart'"),
        ({"lora": Lora(targets=["q_prj"])}, "did you mean 'q_proj'"),
        ({"lora": Lora(targets=["qkv"])}, "puts adapters into the vision_tower"),
    ],
)
def test_a_refused_option_leaves_the_model_as_it_was(model, options, message):
    before = describe(model)
    with pytest.raises(OptionError, match=message):
        prepare_model(model, **EVERYTHING | options)
    assert describe(model) == before


@pytest.mark.parametrize("release", ["0.21.0", "99.1"])
def test_a_peft_that_transformers_refuses(model, monkeypatch, release):
    pytest.importorskip("peft")
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", release)
    refused = release == "99.1"
    assert bool(get_peft_refusal()) == refused
    if refused:
        before = describe(model)
        with pytest.raises(MissingLibraryError, match="needs peft 99.1 or later.*'peft>=99.1'.*transformers<5.24"):
            prepare_model(model, lora=Lora())
        assert describe(model) == before
