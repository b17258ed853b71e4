"""Two steps of text loss on several ranks, with DDP or DeepSpeed ZeRO-3; run by test_text_loss.py.

torchrun --nproc-per-node 2 tests/training/text_loss_ranks.py losses.json
"""

import sys

import torch
from torch import nn

from tests.helpers.ranks import write_and_end

STEPS, RATE = 3, 0.05
LABELS = [(4, 9, 0, 0), (2, 13, 5, 1)]  # how many each of the four sequences ends with, in even and odd steps
HEADS = ("tied", "untied", "wrapped")


class Adapted(nn.Module):
    """A head with a low-rank adapter."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def build(head):
    from swim_fast.demo.tiny_model import ModelSize, build_model, train_tokenizer
    from swim_fast.modeling.text_loss import attach_text_loss

    size = ModelSize(hidden_size=64, intermediate_size=64, num_layers=1, vision_depth=1)
    model = build_model(train_tokenizer(["a dog and a cat"] * 4, 300), size, seed=0)
    torch.manual_seed(1)
    if head != "tied":
        model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    if head == "wrapped":
        model.lm_head = Adapted(model.lm_head)
    model.model.visual.requires_grad_(False)  # there is no picture
    attach_text_loss(model, block_logits=8 * 280)  # wrapped: chunks of 8 tokens
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batches(step):
    """Two batches of two sequences; in even steps the second has no label."""
    ids = torch.randint(20, 250, (4, 19), generator=torch.Generator().manual_seed(step % 2))
    labels = torch.full_like(ids, -100)
    for row, count in enumerate(LABELS[step % 2]):
        labels[row, 19 - count :] = ids[row, 19 - count :]
    return [{"input_ids": ids[i : i + 2], "labels": labels[i : i + 2], "num_items_in_batch": 1} for i in (0, 2)]


def counted(step):
    from swim_fast.modeling.text_loss import count_labels

    return sum(count_labels(batch["labels"]) for batch in batches(step))


def losses_of_one(head):
    """Loss of every step on one rank, which sees both batches."""
    model = build(head)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    found = []
    for step in range(STEPS):
        texts = [model(**batch).loss for batch in batches(step)]
        loss = sum(texts) / counted(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def losses_of_this_rank(head, rank, how):
    model = build(head)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE)
    if how == "zero3":
        import deepspeed

        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else small weights are whole all the time
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert all(p.shape == (0,) for p in model.lm_head.parameters())
    else:
        engine = nn.parallel.DistributedDataParallel(model)
    found = []
    for step in range(STEPS):
        text = engine(**batches(step)[rank]).loss
        loss = 2 * text / counted(step)  # ranks are averaged
        if how == "zero3":
            engine.backward(loss)
            engine.step()
            assert all(p.shape == (0,) for p in model.lm_head.parameters())
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        total = text.detach() / counted(step)
        torch.distributed.all_reduce(total)
        found.append(total.item())
    return found


def main(path):
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    found = {f"{how} {head}": losses_of_this_rank(head, rank, how) for how in ("ddp", "zero3") for head in HEADS}
    write_and_end(path, found)


if __name__ == "__main__":
    main(sys.argv[1])
