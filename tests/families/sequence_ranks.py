"""Models that share their sequences among ranks against themselves on one rank; run by test_sequence_parallel.py.

torchrun --nproc-per-node P -m tests.families.sequence_ranks errors.json FAMILY …
"""

import copy
import itertools
import math
import sys

import torch
import torch.distributed as dist

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.batch.positions import PositionIds
from swim_fast.families import find_family, get_eligible_layers
from swim_fast.modeling import offload
from swim_fast.modeling.prepare import prepare_model
from swim_fast.modeling.sequence_group import SequenceGroup
from swim_fast.modeling.sequence_parallel import get_frame_share
from tests.families.test_models import sample_of, text_sample
from tests.families.tiny import tiny
from tests.helpers.ranks import write_and_end

MOE = ("Qwen3-VL MoE", "GLM-4.5V", "Qwen3-Omni")  # torch multiplies by experts in fp32 at most


def batch_of(name, model, pack):
    """Two videos, the second of which is shorter, and a text."""
    samples = [sample_of(name), sample_of(name, frames=[0, 3]), text_sample(name)]
    samples = samples[:1] + samples[2:] if name == "LLaVA-OneVision" else samples
    batch = Collator(tiny(name).processor, PositionIds(model.config), pack=pack)(samples)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] % 3 == 0, -100)
    return {key: value for key, value in batch.items() if key != "label_positions"}


def dtype_of(name):
    return torch.float32 if name in MOE else torch.float64


def keep_share(inputs, share):
    """Cut the patches of whole videos to those that this rank decodes."""
    pixels, grids, parts = inputs["pixel_values_videos"], inputs["video_grid_thw"].tolist(), []
    for (time, height, width), clip in zip(grids, pixels.split([math.prod(grid) for grid in grids]), strict=True):
        own = share.of_clip(time)
        parts.append(clip[own.start * height * width : own.stop * height * width])
    return inputs | {"pixel_values_videos": torch.cat(parts)}


def run(model, batch, group, own):
    """Losses, maps and the gradients of this rank's share of them."""
    inputs, share = model_inputs(batch, dtype=model.dtype), get_frame_share(model)
    inputs = keep_share(inputs, share) if own and share is not None else inputs
    inputs = {k: v.to(model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    model.zero_grad()
    about = {"labels": batch["labels"], "noun_queries": batch["noun_queries"], "num_items_in_batch": 1}
    outputs = model(**inputs, **about, use_cache=False)
    maps = torch.stack(list(outputs.attentions)).double()
    upstream = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_maps = (maps * upstream).sum() / (1 if group is None else group.ranks)
    (outputs.loss + of_maps).backward()
    grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    return outputs.loss.detach(), maps.detach(), grads


def compare(name, ranks, attention, pack, checkpointing, fused, own=True, spare=False):
    """Relative errors of text loss, maps and gradients.

    Args:
        own: ranks get the pixels that they encode alone.
        spare: activations on the host, and MLPs in tiles.
    """
    stock = tiny(name).build().to(dtype_of(name)).train()
    stock.set_attn_implementation(attention)
    if checkpointing:
        stock.gradient_checkpointing_enable({"use_reentrant": False})
    group = SequenceGroup.of_world(ranks)
    found = {}
    for shared in (None, group):
        model = copy.deepcopy(stock)
        layers = get_eligible_layers(model)
        options = {"activation_offload": True, "mlp_tiles": 3} if spare else {}
        options |= {"layers": layers, "fused": fused, "packed": pack, "ranks": ranks, "sequence_group": shared}
        prepare_model(model, **options)
        embedded = []
        model.get_input_embeddings().register_forward_hook(lambda module, args, out, seen=embedded: seen.append(out))
        batch = batch_of(name, model, pack)
        text, maps, grads = run(model, batch, shared, own)
        if shared is not None:
            if find_family(model.config).embeds_part:
                assert embedded[0].shape[1] == shared.count_part(batch["input_ids"].shape[1])
            for share in (text, grads):
                dist.all_reduce(share)
        found[shared is not None] = text, maps, grads
    errors = [(mine - one).norm() / one.norm() for mine, one in zip(found[True], found[False], strict=True)]
    return [float(error) for error in errors]


def main(output, *names):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    offload.SMALLEST = 0  # a tiny model's are all small
    errors = {}
    for name in names:
        packable = find_family(tiny(name).build().config).packable
        first = name == names[0]
        packs = (False, True) if packable else (False,)
        kinds = (
            [("sdpa", "eager"), packs, (False, True), (True, False)] if first else [("sdpa",), packs, (False,), (True,)]
        )
        cases = list(itertools.product(*kinds))
        cases += [("sdpa", False, checkpointing, True, True, True) for checkpointing in (False, True) if first]
        cases += [("sdpa", pack, False, True, False) for pack in packs if first]
        for case in cases:
            errors[" ".join(map(str, (name, *case)))] = compare(name, dist.get_world_size(), *case)
    group = SequenceGroup.of_world(dist.get_world_size())
    assert group.gather_objects({group.rank}) == [{rank} for rank in range(group.ranks)]
    assert group.is_same(2**62 - 1, "cpu") and not group.is_same(group.rank, "cpu")
    write_and_end(output, errors)


if __name__ == "__main__":
    main(*sys.argv[1:])
