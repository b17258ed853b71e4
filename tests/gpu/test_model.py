"""A tiny bf16 Qwen2.5-VL with noun maps on the device of `--device`: fused, checkpointed, compiled, replayed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from swim_fast.demo.tiny_model import ModelSize, build_model, train_tokenizer
from swim_fast.loss.mask_loss import mask_alignment_loss
from swim_fast.loss.targets import MaskTargets
from swim_fast.modeling import attach_noun_attention, fused_attention
from swim_kernels import NounQueries, flash_noun_attention, noun_attention
from tests.helpers.pretend_gpu import is_running
from tests.modeling.test_fused_attention import batch, calls  # noqa: F401

pytestmark = pytest.mark.slow  # a part of `make gpu-check`
LAYERS = [0, 1]
SIZE = ModelSize(hidden_size=128, num_layers=2, num_heads=2, num_key_value_heads=1, initializer_range=0.05)


@pytest.fixture(scope="module")
def exact():
    """The model in float32 on the CPU."""
    return build_model(train_tokenizer(["a dog and a cat"] * 4, 300), SIZE, seed=0)


@pytest.fixture
def model(exact, device):
    return copy.deepcopy(exact).to(device, torch.bfloat16)


def results(model, kind="dense", uses=("output", "maps")):
    """logits at real tokens, maps, and gradients of all parameters, on the CPU."""
    device = next(model.parameters()).device
    inputs, queries = batch(kind)
    generator = torch.Generator().manual_seed(2)
    model.zero_grad()
    outputs = model(**{name: value.to(device) for name, value in inputs.items()}, noun_queries=queries.to(device))
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    values = {"output": outputs.logits[real.to(device)], "maps": torch.stack(outputs.attentions)}
    loss = sum((values[n] * torch.randn(values[n].shape, generator=generator).to(device)).sum() for n in uses)
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in values.items()} | gradients


def assert_as_exact_as(found, plain, exact):
    """No further from the exact results than twice the plain ones, and a rounding."""
    assert found.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        error, allowed = ((values[name].double() - truth.double()).norm() for values in (found, plain))
        budget = 2 * allowed + 2**-7 * truth.double().norm()
        assert error <= budget + 1e-6, f"{name}: error {error:.2e} above the budget {budget:.2e}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dense", "right padding"])
def test_fused_and_separate(model, exact, kind, checkpointing, device, calls):  # noqa: F811
    truth = results(attach_noun_attention(copy.deepcopy(exact), LAYERS, fused=False), kind)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    separate = results(attach_noun_attention(model, LAYERS, fused=False), kind)
    assert calls == []
    fused = results(attach_noun_attention(model, LAYERS), kind)
    if device.type == "cpu":
        assert set(calls) == {"torch_cpu"}
    elif kind == "dense":  # padding is a mask for sdpa, which torch's flash attention does not take
        assert set(calls) == {"torch_cuda"}
    assert_as_exact_as(fused, separate, truth)
    assert_as_exact_as(separate, fused, truth)


def test_autocast(exact, device, calls):  # noqa: F811
    truth = results(attach_noun_attention(copy.deepcopy(exact), LAYERS, fused=False))
    model = copy.deepcopy(exact).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        separate = results(attach_noun_attention(model, LAYERS, fused=False))
        fused = results(attach_noun_attention(model, LAYERS))
    assert calls
    assert_as_exact_as(fused, separate, truth)


def test_compiled(exact, device):
    """Ops and losses in one graph, and a whole model with what breaks its graph."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 40, 32, generator=generator).to(device) for heads in (4, 2))
    queries = batch("dense")[1].to(device)
    queries = replace(queries, sequence=torch.zeros_like(queries.sequence))

    def maps_of(query, key):
        return noun_attention(query * 2, key, queries)

    backend = "inductor" if device.type == "cuda" and not is_running() else "aot_eager"
    results = []
    for function in (maps_of, torch.compile(maps_of, backend=backend)):
        leaves = [x.detach().requires_grad_() for x in (query, key)]
        maps = function(*leaves)
        results.append([maps.detach(), *torch.autograd.grad(maps.square().sum(), leaves)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    model = attach_noun_attention(copy.deepcopy(exact).to(device), LAYERS)
    inputs, queries = batch("dense")
    inputs = {name: value.to(device) for name, value in inputs.items()}
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        found, expected = (m(**inputs, noun_queries=queries.to(device)) for m in (compiled, model))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.attentions[0], expected.attentions[0], rtol=1e-3, atol=1e-5)


def make_step(seed, device):
    """query, key, value, queries and targets: 4 rows over the cells of their patches, always of one shape."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, heads, 128, 64, generator=generator).to(device, torch.bfloat16) for heads in (4, 2, 2)]
    positions = 70 + torch.randperm(50, generator=generator)[:4]
    keys = torch.stack([torch.arange(4, 28), torch.arange(28, 52)])
    zeros, sets = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0, 1])
    queries = NounQueries(zeros, positions, keys[sets, 0], keys[sets, -1] + 1, sets, keys, over="set")
    masks = [torch.rand(30, 40, generator=generator) < 0.4 for _ in range(4)]
    sizes = torch.full((4,), 4), torch.full((4,), 6)
    targets = MaskTargets(torch.arange(4), zeros, *sizes, torch.arange(4), masks)
    return tensors, queries.to(device), targets.to(device)


@pytest.mark.cuda
def test_graph_captured_on_one_batch_is_replayed_on_the_next(device):
    def step(tensors, queries, targets):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output, maps = flash_noun_attention(*leaves, queries)
        loss = mask_alignment_loss([maps], targets)
        return [loss.detach(), output.detach(), *torch.autograd.grad(loss + output.float().square().mean(), leaves)]

    static, queries, targets = make_step(0, device)
    queries.sequence.add_(0)  # rows that were written to have their plan made on the GPU, as in the capture
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and asks what is asked once of a batch
        for _ in range(2):
            step(static, queries, targets)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(static, queries, targets)
    tensors, other, other_targets = make_step(1, device)
    with torch.no_grad():
        for old, new in zip((*static, *queries.tensors()), (*tensors, *other.tensors()), strict=True):
            old.copy_(new)
        targets.packed.bits.copy_(other_targets.packed.bits)
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(replayed, step(tensors, other, other_targets), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_second_gpu(exact):
    """The current device is another one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    models = (copy.deepcopy(exact).to(f"cuda:{index}", torch.bfloat16) for index in (0, 1))
    first, second = (results(attach_noun_attention(model, LAYERS)) for model in models)
    for name, expected in first.items():
        torch.testing.assert_close(second[name], expected, rtol=1e-2, atol=1e-2)


def test_log_says_what_runs(model, device, caplog):
    fused_attention._log_once.cache_clear()
    caplog.set_level("INFO", logger=fused_attention.logger.name)
    results(attach_noun_attention(model, LAYERS))
    lines = [record.message for record in caplog.records if record.name == fused_attention.logger.name]
    provider = fused_attention.describe_provider("auto", torch.empty(0, device=device))
    assert provider.startswith("auto: torch_cuda" if device.type == "cuda" else "auto")
    assert lines == [f"noun maps behind sdpa on {device.type}: one node with the attention ({provider})"]
