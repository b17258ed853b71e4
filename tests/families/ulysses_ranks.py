"""An attention whose sequence is shared, by our exchange and by DeepSpeed's; run by test_sequence_parallel.py.

torchrun --nproc-per-node P -m tests.families.ulysses_ranks errors.json
"""

import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLTextConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from swim_fast.modeling import sequence_parallel
from swim_fast.modeling.sequence_group import SequenceGroup
from tests.helpers.ranks import write_and_end

BATCH, HEADS, LENGTH, SIZE = 2, 4, 12, 8


def build_module(key_heads: int) -> Qwen2_5_VLAttention:
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": key_heads, "hidden_size": HEADS * SIZE}
    config = Qwen2_5_VLTextConfig(**sizes, attn_implementation="sdpa")
    return Qwen2_5_VLAttention(config, layer_idx=0)


def share_by_ours(key_heads: int, group: SequenceGroup):
    module = build_module(key_heads)
    module._shared_sequence = sequence_parallel._Shared(module.config, group)
    whole = sequence_parallel._Whole(LENGTH, None, None)
    return lambda *parts: sequence_parallel.shared_attention_forward(module, *parts, None, whole)[0]


def share_by_deepspeed(key_heads: int, group: SequenceGroup):
    module = build_module(key_heads)
    attention = UlyssesSPAttentionHF(
        sdpa_attention_forward, BATCH, HEADS, SIZE, key_heads, 1, group.process_group, seq_length_is_variable=True
    )
    positions = group.get_part(torch.arange(LENGTH).expand(BATCH, -1), 1).contiguous()
    return lambda *parts: attention(module, *parts, None, position_ids=positions)[0]


def attend(attention, tensors, upstream, group: SequenceGroup):
    """Output [B, l, Hq, D] of this rank's part, and the gradients of its query, key and value."""
    parts = [group.get_part(tensor, 2).requires_grad_() for tensor in tensors]
    output = attention(*parts).reshape(BATCH, -1, HEADS, SIZE)
    return output.detach(), *torch.autograd.grad(output, parts, group.get_part(upstream, 1))


def compare(key_heads: int, dtype: torch.dtype, group: SequenceGroup) -> dict[str, float]:
    """Largest relative errors of output and gradients by our exchange against those by others."""
    generator = torch.Generator().manual_seed(key_heads)
    shapes = [(BATCH, heads, LENGTH, SIZE) for heads in (HEADS, key_heads, key_heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    upstream = torch.randn(BATCH, LENGTH, HEADS, SIZE, generator=generator, dtype=dtype)
    ours = share_by_ours(key_heads, group)
    whole_graph = torch.compile(ours, backend="aot_eager", fullgraph=True)
    ways = {"deepspeed": share_by_deepspeed(key_heads, group), "compiled": whole_graph}
    found = {name: attend(way, tensors, upstream, group) for name, way in ways.items()}
    wholes = [tensor.clone().requires_grad_() for tensor in tensors]
    output = scaled_dot_product_attention(*wholes, is_causal=True, enable_gqa=True).transpose(1, 2)
    grads = torch.autograd.grad(output, wholes, upstream)
    found["one rank"] = group.get_part(output.detach(), 1), *(group.get_part(grad, 2) for grad in grads)
    ours = attend(ours, tensors, upstream, group)
    return {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(ours, other, strict=True))
        for name, other in found.items()
    }


def main(output: str) -> None:
    deepspeed.init_distributed("gloo")
    torch.set_num_threads(1)
    group = SequenceGroup.of_world(dist.get_world_size())
    errors = {}
    for key_heads in (4, 2, 1):
        for dtype in (torch.float32, torch.float64):
            errors[f"{key_heads} {dtype}"] = compare(key_heads, dtype, group)
    found = [None] * group.ranks
    dist.all_gather_object(found, errors)
    write_and_end(output, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
