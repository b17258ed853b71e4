"""A tiny stock Qwen2.5-VL with the noun maps in the attention's own node: as with an op of their own."""

import importlib
import logging

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swim_fast.modeling import attach_noun_attention, fused_attention
from swim_kernels import NounQueries
from swim_kernels.flash_noun_attention import node
from tests.kernels import flash_stand_ins
from tests.kernels.flash_noun_attention_cases import stand_ins  # noqa: F401

LENGTH, LAYERS = 37, [0, 3]
SEGMENTS = (15, 22)  # of the packed batch


def batch(kind):
    """inputs and queries: two sequences of text, padded or not, or one that two are packed into."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 250, (1 if kind == "packed" else 2, LENGTH), generator=generator)
    position, start = torch.tensor([30, 33, 25]), torch.zeros(3, dtype=torch.long)
    sequence = torch.tensor([0, 0, 1])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "right padding":
        inputs["attention_mask"][1, 29:] = 0
    elif kind == "left padding":
        inputs["attention_mask"][1, :8] = 0
        start[2] = 8
    elif kind == "packed":
        inputs.pop("attention_mask")
        position, sequence = torch.tensor([30, 12, 33]), torch.zeros(3, dtype=torch.long)
        start = torch.tensor([SEGMENTS[0], 0, SEGMENTS[0]])
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in SEGMENTS]).expand(4, 1, -1)
    key_sets = torch.tensor([[9, 10, 11, 12], [16, 17, 22, 20]])
    key_set = (start >= SEGMENTS[0]).long()
    return inputs, NounQueries(sequence, position, start, position + 1, key_set, key_sets)


def results(model, inputs, queries, uses):
    """logits at real tokens, maps, and gradients of all parameters."""
    generator = torch.Generator().manual_seed(2)
    model.zero_grad()
    outputs = model(**inputs, noun_queries=queries)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    logits, maps = outputs.logits[real], torch.stack(outputs.attentions)
    loss = 0
    for value, name in ((logits, "output"), (maps, "maps")):
        upstream = torch.randn(value.shape, generator=generator)
        if name in uses:
            loss = loss + (value * upstream).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "maps": maps.detach()} | gradients


def assert_same(fused, separate):
    assert fused.keys() == separate.keys()
    for name, expected in separate.items():
        # a constant added to all keys changes no softmax: the gradient of this bias is a sum that cancels
        tolerance = 3e-6 if name.endswith("k_proj.bias") else 1e-6
        assert (fused[name] - expected).norm() <= tolerance * expected.norm() + 1e-12, name


@pytest.fixture
def calls(monkeypatch):
    """Which providers were run."""
    seen = []
    apply = node.FlashNounAttention.apply
    monkeypatch.setattr(
        node.FlashNounAttention, "apply", lambda *arguments: (seen.append(arguments[5].name), apply(*arguments))[1]
    )
    return seen


@pytest.mark.parametrize("uses", [("output", "maps"), ("output",), ("maps",)], ids=" and ".join)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dense", "right padding", "left padding", "packed"])
def test_same_results_and_gradients(model, kind, checkpointing, uses, calls):
    inputs, queries = batch(kind)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    separate = results(attach_noun_attention(model, LAYERS, fused=False), inputs, queries, uses)
    assert calls == []
    fused = results(attach_noun_attention(model, LAYERS), inputs, queries, uses)
    assert calls == ["torch_cpu"] * len(LAYERS) * (2 if checkpointing else 1)
    assert_same(fused, separate)


def flash_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """As transformers' flash attention behaves: it runs on the real tokens and leaves zeros elsewhere."""
    outputs = []
    for b, tokens in enumerate(torch.ones_like(query[:, 0, :, 0]) if attention_mask is None else attention_mask):
        real = tokens.bool()
        packed = (x[b, :, real].transpose(0, 1) for x in (query, key, value))
        ends = torch.tensor([0, real.sum()]).int() if cu_seq_lens_q is None else cu_seq_lens_q
        output = flash_stand_ins.attention(*packed, scaling, None, ends)[0]
        outputs.append(output.new_zeros(len(real), *output.shape[1:]).index_put((real.nonzero()[:, 0],), output))
    return torch.stack(outputs), None


@pytest.fixture
def flash(model, monkeypatch, stand_ins):  # noqa: F811
    """A function that makes the model believe in a flash attention library."""

    def pretend(name):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, flash_attention)
        model.config._attn_implementation_internal = name
        model.model.language_model.config._attn_implementation_internal = name
        return model

    return pretend


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
@pytest.mark.parametrize("kind", ["dense", "right padding", "packed"])
def test_flash_attention_libraries(flash, kind, name, calls):
    model = flash(name)
    inputs, queries = batch(kind)
    if kind == "packed":
        ends = torch.tensor([0, SEGMENTS[0], LENGTH], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        inputs |= {"max_length_q": max(SEGMENTS), "max_length_k": max(SEGMENTS)}
    separate = results(attach_noun_attention(model, LAYERS, fused=False), inputs, queries, ("output", "maps"))
    fused = results(attach_noun_attention(model, LAYERS), inputs, queries, ("output", "maps"))
    assert calls == [fused_attention.PROVIDERS[name]] * len(LAYERS)
    assert_same(fused, separate)


def test_padding_comes_out_as_flash_attention_leaves_it(flash):
    model = flash("flash_attention_2")
    inputs, queries = batch("right padding")
    plain = model(**inputs).logits
    fused = attach_noun_attention(model, LAYERS)(**inputs, noun_queries=queries).logits
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)  # at the padding as well


@pytest.fixture
def log(caplog):
    fused_attention._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger=fused_attention.logger.name)
    return lambda: [record.message for record in caplog.records if record.name == fused_attention.logger.name]


def test_one_log_line_says_which(model, log):
    inputs, queries = batch("dense")
    attach_noun_attention(model, LAYERS)
    for _ in range(2):
        model(**inputs, noun_queries=queries)
    assert log() == ["noun maps behind sdpa on cpu: one node with the attention (auto)"]


@pytest.mark.parametrize(
    ("reason", "attention", "kind"),
    [
        ("asked for", "sdpa", "dense"),
        ("are to be eager", "sdpa", "dense"),
        ("no provider for the attention 'eager'", "eager", "dense"),
        ("row 2 has the keys", "sdpa", "other padding"),
        ("dropout", "sdpa", "dropout"),
        ("padded on the left", "flash_attention_2", "left padding"),
        ("packed by position ids alone", "flash_attention_2", "packed"),
        ("flash-attn-4 cannot be used", "flash_attention_4", "missing"),
    ],
)
def test_or_why_not(reason, attention, kind, model, flash, log, calls, monkeypatch):
    inputs, queries = batch({"other padding": "right padding"}.get(kind, kind))
    columns = list(queries.tensors())
    if kind == "other padding":
        columns[2] = torch.tensor([0, 0, 3])
    elif kind == "dropout":
        model.train()
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.1
    elif kind == "missing":
        monkeypatch.setitem(__import__("sys").modules, "flash_attn.cute.interface", None)
    if attention.startswith("flash"):
        flash(attention)
    else:
        model.set_attn_implementation(attention)
    backend = "eager" if "eager" in reason and attention == "sdpa" else "auto"
    attach_noun_attention(model, LAYERS, backend, fused=reason != "asked for")
    if kind == "packed":
        inputs["position_ids"] = inputs["position_ids"].contiguous()
    outputs = model(**inputs, noun_queries=NounQueries(*columns))
    assert len(outputs.attentions) == len(LAYERS) and calls == []
    (line,) = log()
    assert f"noun maps behind {attention} on cpu: an op of their own (" in line and reason in line


@pytest.mark.parametrize("kind", ["full", "own ranges", "sets"])
def test_rows_with_a_softmax_of_their_own_stay_in_the_node(kind, model, calls):
    inputs, queries = batch("dense")
    columns = list(queries.tensors())
    if kind == "full":
        columns[3] = torch.full_like(columns[3], 29)
        columns[1] = torch.tensor([20, 13, 28])
    elif kind == "own ranges":
        columns[2] = torch.tensor([0, 3, 0])
    queries = NounQueries(*columns, over="set" if kind == "sets" else "range")
    separate = results(attach_noun_attention(model, LAYERS, fused=False), inputs, queries, ("output", "maps"))
    assert calls == []
    fused = results(attach_noun_attention(model, LAYERS), inputs, queries, ("output", "maps"))
    assert calls == ["torch_cpu"] * len(LAYERS)
    assert_same(fused, separate)


def test_autocast(model, calls):
    """Output as the attention by itself gives it; maps of the same rounded query and key."""
    inputs, queries = batch("dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        separate = attach_noun_attention(model, LAYERS, fused=False)(**inputs, noun_queries=queries)
        fused = attach_noun_attention(model, LAYERS)(**inputs, noun_queries=queries)
    assert calls and torch.equal(fused.logits, separate.logits)
    for a, e in zip(fused.attentions, separate.attentions, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-6)


def test_autocast_gives_the_separate_op_what_the_attention_has(model, monkeypatch):
    """Rotary embedding in fp32 makes fp32 queries and keys of 16-bit ones; the attention casts them back."""
    seen, module = [], importlib.import_module("swim_fast.modeling.noun_attention")
    op = module.noun_attention
    monkeypatch.setattr(module, "noun_attention", lambda q, k, *a, **n: seen.append(q.dtype) or op(q, k, *a, **n))
    inputs, queries = batch("dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attach_noun_attention(model, LAYERS, fused=False)(**inputs, noun_queries=queries)
    assert seen == [torch.bfloat16] * len(LAYERS)


def test_padding_that_is_known_is_not_looked_for():
    mask = torch.tensor([[0, 1], [1, 1]])
    assert fused_attention.is_right_padded(mask, "flash_attention_2") is False
    assert fused_attention.is_right_padded(mask, "flash_attention_2", known=True) is True
    assert fused_attention.is_right_padded(mask, "sdpa", known=True) is None


def test_provider_of_sdpa(model, calls):
    inputs, queries = batch("dense")
    attach_noun_attention(model, LAYERS, provider="torch_cpu")(**inputs, noun_queries=queries)
    assert calls == ["torch_cpu"] * len(LAYERS)
    attach_noun_attention(model, LAYERS, provider="torch_cudnn")(**inputs, noun_queries=queries)  # separately, here
    assert calls == ["torch_cpu"] * len(LAYERS)
