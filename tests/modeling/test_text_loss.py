import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from swim_fast.modeling.text_loss import count_labels, label_positions, text_loss_sum


def test_equals_the_full_loss_with_gradient():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 11, (3, 17), generator=generator)
    labels[:, :6] = -100
    labels[1, 9:14] = -100
    labels[2] = -100
    labels[0, 0] = 5  # never predicted
    logits = torch.randn(3, 17, 11, generator=generator, requires_grad=True)
    positions = label_positions(labels)
    assert len(positions) < 17
    mine = text_loss_sum(logits[:, positions], labels, positions)
    (gradient,) = torch.autograd.grad(mine, logits)
    theirs = ForCausalLMLoss(logits, labels, 11, num_items_in_batch=1)
    (expected,) = torch.autograd.grad(theirs, logits)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected)
    assert count_labels(labels) == (labels[:, 1:] != -100).sum()


def test_no_label_gives_zero_with_a_graph():
    labels = torch.full((2, 5), -100)
    logits = torch.randn(2, 5, 7, requires_grad=True)
    positions = label_positions(labels)
    loss = text_loss_sum(logits[:, positions], labels, positions)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
