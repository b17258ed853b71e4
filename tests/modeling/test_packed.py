"""Packed batches of video and text on flash attention as transformers calls it, and in the node with the noun maps."""

import copy

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from swim_fast.modeling import attach_noun_attention
from swim_fast.modeling.packed import accept_packed_batches
from swim_kernels import NounQueries
from swim_kernels.flash_noun_attention import node
from tests.kernels import flash_stand_ins
from tests.kernels.flash_noun_attention_cases import stand_ins  # noqa: F401

LENGTHS = (23, 1, 31, 12)
VIDEO = 40  # first of the 8 visual tokens, in the third sample
ENDS = [0, 23, 24, 55, 67]


@pytest.fixture
def model(stock):
    model = copy.deepcopy(stock)
    accept_packed_batches(model)
    return model


@pytest.fixture
def batch(model):
    """Inputs and queries: three texts and a video of two patches."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    ids = torch.randint(20, 250, (1, sum(LENGTHS)), generator=generator)
    types = torch.zeros_like(ids)
    ids[0, VIDEO : VIDEO + 8] = config.video_token_id
    types[0, VIDEO : VIDEO + 8] = 2
    vision = config.vision_config
    pixels = torch.randn(32, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=generator)
    text = torch.cat([torch.arange(length) for length in LENGTHS])
    ends = torch.tensor(ENDS, dtype=torch.int32)
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": types,
        "position_ids": text.expand(4, 1, -1),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
    position, start = torch.tensor([20, 50, 53]), torch.tensor([0, 24, 24])
    key_sets = torch.tensor([[3, 4, 5, 6, -1, -1, -1, -1], list(range(VIDEO, VIDEO + 8))])
    return inputs, NounQueries(
        torch.zeros_like(position), position, start, position + 1, torch.tensor([0, 1, 1]), key_sets
    )


def dense(q, k, v, causal=True, softmax_scale=None, **kwargs):
    raise AssertionError("attention of a packed batch across its samples")


@pytest.fixture
def flash(model, monkeypatch, stand_ins):  # noqa: F811
    """transformers' flash attention 2 on a library that computes on the CPU; what it was called with.

    Called with (lengths of the sequences, causal, longest).
    """
    calls = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        calls.append((cu_seqlens_q.diff().tolist(), causal, int(max_seqlen_q)))
        if causal:
            return flash_stand_ins.attention(q, k, v, softmax_scale, None, cu_seqlens_q)[0]
        parts = (x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v))
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), scale=softmax_scale)
            for part in zip(*parts, strict=True)
        ]
        return torch.cat([output.transpose(0, 1) for output in outputs])

    process = flash_utils._lazy_define_process_function(varlen)
    with_cache = hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")  # transformers from 5.20 on
    functions = (dense, varlen, None, None, None), (process, dict) if with_cache else process
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    for config in (model.config, model.model.language_model.config, model.model.visual.config):
        config._attn_implementation_internal = "flash_attention_2"
    return calls


def without_lengths(inputs):
    return {k: v for k, v in inputs.items() if k[:3] not in ("cu_", "max")} | {"use_cache": False}


def results(model, inputs, queries=None):
    generator = torch.Generator().manual_seed(2)
    model.zero_grad()
    outputs = model(**inputs, **({} if queries is None else {"noun_queries": queries}))
    values = [outputs.logits, *(outputs.attentions or ())]
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {str(number): value.detach() for number, value in enumerate(values)} | gradients


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-4 if name.endswith("k_proj.bias") else 1e-5  # that one's gradient is a sum that cancels
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-9, name


def test_flash_attention_gets_the_samples_and_the_vision_tower_its_own(model, batch, flash, stock):
    inputs, _ = batch
    expected = results(copy.deepcopy(stock), without_lengths(inputs))
    found = results(model, inputs)
    assert_same(found, expected)
    language = [call for call in flash if call[1]]
    vision = [call for call in flash if not call[1]]
    assert language == [(list(LENGTHS), True, max(LENGTHS))] * len(model.model.language_model.layers)
    assert len(vision) == len(model.model.visual.blocks) and all(sum(lengths) == 32 for lengths, *_ in vision)


def test_position_ids_alone_tell_flash_attention_as_much(model, batch, flash):
    inputs, _ = batch
    with_lengths = results(model, inputs)
    bare = results(model, without_lengths(inputs))
    assert_same(bare, with_lengths)
    assert [call for call in flash if call[1]][-1] == (list(LENGTHS), True, max(LENGTHS))


def test_without_it_the_vision_tower_is_handed_the_samples_lengths(batch, flash, model, stock):
    """Unless the release of transformers keeps them to the language model by itself, as 5.24 does."""
    inputs, _ = batch
    expected = results(copy.deepcopy(stock), without_lengths(inputs))
    model.model.visual._forward_pre_hooks.clear()
    try:
        found = results(model, inputs)
    except TypeError as error:
        assert "cu_seq_lens_q" in str(error)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_node_with_the_noun_maps(model, batch, request, monkeypatch, attention, checkpointing):
    if attention != "sdpa":
        request.getfixturevalue("flash")
    inputs, queries = batch
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [0, 3]
    separate = results(attach_noun_attention(model, layers, fused=False), inputs, queries)
    seen, apply = [], node.FlashNounAttention.apply
    monkeypatch.setattr(
        node.FlashNounAttention, "apply", lambda *arguments: (seen.append(arguments[5].name), apply(*arguments))[1]
    )
    fused = results(attach_noun_attention(model, layers), inputs, queries)
    name = {"sdpa": "torch_cpu", "flash_attention_2": "flash_attn_2"}[attention]
    assert seen == [name] * len(layers) * (2 if checkpointing else 1)
    assert_same(fused, separate)
