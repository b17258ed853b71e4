"""The text loss by Liger's fused linear cross-entropy, with a stand-in in torch."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from swim_fast.modeling import liger, text_loss
from swim_fast.modeling.text_loss import attach_text_loss, count_labels
from tests.modeling.text_loss_cases import assert_same, batch, gradients, plain_loss, untied


class LigerStandIn(torch.autograd.Function):
    """Liger's function as 0.8.5 has it, in torch: gradients in the forward, which are scaled in the backward."""

    calls = []

    @staticmethod
    def forward(
        ctx,
        _input,
        weight,
        target,
        bias=None,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        accum_dtype=None,
        use_token_scaling=False,
        return_token_accuracy=False,
        return_predicted_tokens=False,
        ce_impl=None,
        ce_mode=None,
        chunk_mem_const=1,
    ):
        assert ce_weight is None and softcap is None and lse_square_scale == label_smoothing == 0.0
        assert not (return_z_loss or use_token_scaling or return_token_accuracy or return_predicted_tokens)
        LigerStandIn.calls.append((tuple(_input.shape), reduction, accum_dtype, chunk_mem_const))
        ctx.needed = _input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in (_input, weight, bias)]
            logits = F.linear(*leaves).float()
            loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
            made = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
        ctx.save_for_backward(*made)
        return loss.detach(), None, None, None

    @staticmethod
    def backward(ctx, grad, *others):
        assert ctx.needed[0], "Liger makes no gradient at all where the input needs none"
        made = [gradient * grad for gradient in ctx.saved_tensors]
        bias = made[2] if len(made) > 2 else None
        return made[0], made[1] if ctx.needed[1] else None, None, bias, *[None] * 14


@pytest.fixture
def by_liger(monkeypatch):
    import liger_kernel.ops

    monkeypatch.setattr(liger, "get_refusal", lambda device_type: None)
    monkeypatch.setattr(liger_kernel.ops, "LigerFusedLinearCrossEntropyFunction", LigerStandIn)
    LigerStandIn.calls.clear()


@pytest.mark.needs("liger_kernel")
def test_the_stand_in_has_ligers_signature():
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    def arguments(function):
        return [(p.name, p.default) for p in inspect.signature(function.forward).parameters.values()]

    assert arguments(LigerStandIn) == arguments(Function)


@pytest.mark.needs("liger_kernel")
@pytest.mark.parametrize("head", ["tied", "bias"])
def test_by_liger(model, log, by_liger, head):
    if head == "bias":
        untied(model)
    inputs, labels = batch("padded")
    expected = plain_loss(model, inputs, labels)
    theirs = gradients(model, 3 * expected)
    attach_text_loss(model, block_logits=7 * 300)
    loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, 3 * loss), theirs)
    ((shape, reduction, accumulated, _),) = LigerStandIn.calls
    assert shape == (count_labels(labels), 128) and (reduction, accumulated) == ("sum", torch.float32)
    assert "text loss on cpu: Liger's fused linear cross-entropy" in log.text


@pytest.mark.needs("liger_kernel")
def test_liger_is_not_asked_what_it_cannot_do(model, by_liger):
    inputs, labels = batch("padded")
    attach_text_loss(model)
    none = model(**inputs, labels=torch.full_like(labels, -100), num_items_in_batch=1).loss
    assert none == 0 and none.requires_grad
    untied(model).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model(**inputs, labels=labels, num_items_in_batch=1).loss.backward()  # hidden states that need no gradient
    assert model.lm_head.weight.grad.any() and not LigerStandIn.calls
    with torch.no_grad():
        model(**inputs, labels=labels)
    assert len(LigerStandIn.calls) == 1
    attach_text_loss(model, use_liger=False)(**inputs, labels=labels)
    assert len(LigerStandIn.calls) == 1


@pytest.mark.needs("liger_kernel")
@pytest.mark.parametrize(("tokens", "chunks"), [(10, 1), (300, 2), (6000, 28)])
def test_ligers_chunks_are_of_the_size_asked_for(by_liger, tokens, chunks):
    """For the vocabulary of a 7B model; how Liger cuts, by the text of its forward."""
    vocabulary, width = 152064, 3584
    weight = torch.empty(1).expand(vocabulary, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LigerStandIn, "apply", lambda *arguments: [arguments[-1]])
        constant = text_loss._sum_by_liger(weight[:tokens], weight, torch.zeros(tokens), None, 2**25)
    factor = -(-vocabulary // (constant * width))
    assert factor <= chunks and factor >= 0.6 * chunks


def test_on_the_cpu_the_log_says_why_not_liger(model, log):
    inputs, labels = batch("padded")
    attach_text_loss(model)
    model(**inputs, labels=labels)
    model(**inputs, labels=labels)
    said = [line.getMessage() for line in log.records if "text loss on" in line.getMessage()]
    assert said == [
        "text loss on cpu: blocks of the vocabulary in torch (its kernels need CUDA, and the model is on cpu)"
    ]
