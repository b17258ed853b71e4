"""Bytes that one step's collectives get from this rank, and what the formula says; run by test_long_video.py.

torchrun --nproc-per-node P -m tests.benchmarks.exchange_ranks bytes.json
"""

import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.long_video import count_exchanges
from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.batch.positions import PositionIds
from swim_fast.families import get_eligible_layers
from swim_fast.frame_shares import FrameShare
from swim_fast.modeling.prepare import prepare_model
from swim_fast.modeling.sequence_group import SequenceGroup
from swim_fast.training.dry_run.memory import Geometry
from tests.families.test_models import sample_of
from tests.families.tiny import tiny
from tests.helpers.ranks import write_and_end

KINDS = {
    "all_to_all_single": "all_to_all",
    "allreduce_": "all_reduce",
}


class CountBytes(TorchDispatchMode):
    """Counts the bytes handed to each collective, those of backward too."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in KINDS:
            tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
            self.bytes[KINDS[name]] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def measure(checkpointing: bool) -> tuple[dict, dict]:
    name, group = "Qwen2.5-VL", SequenceGroup.of_world(dist.get_world_size())
    model = tiny(name).build().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepare_model(
        model, layers=get_eligible_layers(model), frozen=["vision_tower"], ranks=group.ranks, sequence_group=group
    )
    sample = sample_of(name)
    batch = Collator(tiny(name).processor, PositionIds(model.config))([sample])
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] % 3 == 0, -100)
    batch.pop("label_positions")
    about = {"labels": batch["labels"], "noun_queries": batch["noun_queries"], "num_items_in_batch": 1}
    with CountBytes() as counted:
        outputs = model(**model_inputs(batch, dtype=model.dtype), **about, use_cache=False)
        (outputs.loss + sum(map.sum() for map in outputs.attentions)).backward()
    patches, rows, columns = sample.grids[0]
    visual = group.get_part(batch["mm_token_type_ids"], 1) > 0
    expected = count_exchanges(
        Geometry.from_config(model.config, largest_module=0),
        group.ranks,
        tokens=batch["input_ids"].shape[1],
        encoded=len(FrameShare(group.ranks, group.rank).of_clip(patches)) * rows * columns,
        held=int(visual.sum()),
        map_values=sum(map.numel() for map in outputs.attentions),
        checkpointing=checkpointing,
        size=4,
    )
    return dict(counted.bytes), expected


def main(output):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = [measure(checkpointing) for checkpointing in (False, True)]
    write_and_end(output, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
