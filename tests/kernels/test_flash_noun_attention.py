"""One node for attention output and maps gives what two nodes give: torch's CPU attention, stand-ins for the others."""

import importlib.util
import inspect
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from swim_kernels import Unsupported, flash_noun_attention
from swim_kernels.flash_noun_attention.api import PROVIDERS
from swim_kernels.flash_noun_attention.providers import flash_attn as flash_attn_providers
from tests.kernels import flash_stand_ins
from tests.kernels.flash_noun_attention_cases import (
    CASES,
    LEFT_PADDED,
    exact,
    fused,
    make,
    relative_error,
    separate,
    stand_ins,  # noqa: F401
)
from tests.kernels.noun_attention_cases import make_queries

LIBRARIES = ("torch_cuda", "flash_attn_2", "flash_attn_3", "flash_attn_4")
NAMES = ("output", "maps", "grad_query", "grad_key", "grad_value")
USES = {"both": (True, True), "only output": (True, False), "only maps": (False, True)}


def use(upstream, which):
    return [u if wanted else None for u, wanted in zip(upstream, USES[which], strict=True)]


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert relative_error(a, e) <= tolerance or not e.any() and not a.any(), (name, relative_error(a, e))


@pytest.mark.parametrize("which", USES)
@pytest.mark.parametrize("case", [*CASES, "left padding"])
def test_torch_on_the_cpu(case, which):
    case = CASES.get(case, LEFT_PADDED)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        *inputs, upstream = make(case, dtype)
        upstream = use(upstream, which)
        if "padding" in case[-1] and upstream[0] is not None:
            upstream[0][0, :, : case[-1]["padding"]] = 0
        actual = fused(*inputs, upstream, provider="auto", as_mask=True)
        expected = exact(*inputs, upstream)
        if "padding" in case[-1]:
            actual[0], expected[0] = (x[:, :, case[-1]["padding"] :] for x in (actual[0], expected[0]))
        assert actual[0].dtype == dtype and actual[1].dtype == dtype
        assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_16_bits_are_as_exact_as_two_nodes(case, dtype):
    errors = {"fused": [0.0] * 5, "separate": [0.0] * 5}
    for seed in range(3):
        *inputs, upstream = make(CASES[case], dtype, seed)
        expected = exact(*inputs, upstream)
        for name, results in (
            ("fused", fused(*inputs, upstream, provider="torch_cpu", as_mask=True)),
            ("separate", separate(*inputs, upstream)),
        ):
            worst = [relative_error(a, e) for a, e in zip(results, expected, strict=True)]
            errors[name] = [max(old, new) for old, new in zip(errors[name], worst, strict=True)]
    rounding = torch.finfo(dtype).eps / 2
    for name, error, budget in zip(NAMES, errors["fused"], errors["separate"], strict=True):
        assert error <= 1.5 * budget + rounding, (name, error, budget)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("which", USES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", LIBRARIES)
def test_libraries(provider, case, which):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        *inputs, upstream = make(CASES[case], dtype)
        upstream = use(upstream, which)
        assert_close(fused(*inputs, upstream, provider=provider), exact(*inputs, upstream), tolerance)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", ["torch_cpu", "flash_attn_2", "flash_attn_4"])
def test_maps_of_each_head(provider, case):
    for which in ("both", "only maps"):
        *inputs, upstream = make(CASES[case], torch.float64, heads="each")
        upstream = use(upstream, which)
        actual = fused(*inputs, upstream, provider=provider, as_mask=provider == "torch_cpu")
        assert actual[1].shape == upstream[1].shape
        assert_close(actual, exact(*inputs, upstream), 1e-13)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("which", USES)
@pytest.mark.parametrize("case", [name for name, (*_, options) in CASES.items() if not options])
def test_cudnn(case, which):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        *inputs, upstream = make(CASES[case], dtype)
        upstream = use(upstream, which)
        assert_close(fused(*inputs, upstream, provider="torch_cudnn"), exact(*inputs, upstream), tolerance)
    assert "no packed sequences and windows" in refusal("packed", provider="torch_cudnn")
    assert "no packed sequences and windows" in refusal("window", provider="torch_cudnn")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("case", CASES)
def test_an_earlier_flash_attn_3(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash_stand_ins.flash_attn_3_older())
    *inputs, upstream = make(CASES[case], torch.float64)
    assert_close(fused(*inputs, upstream, provider="flash_attn_3"), exact(*inputs, upstream), 1e-13)


@pytest.mark.usefixtures("stand_ins")
def test_a_gradient_of_lse_leaves_only_the_keys_that_are_read_out(monkeypatch):
    """flash-attn 4 is given −δ; what is added afterwards concerns no other key."""
    *inputs, upstream = make(CASES["dense"], torch.float64)
    provider = PROVIDERS["flash_attn_4"]
    seen = {}
    backward = type(provider).backward

    def recorded(self, *arguments):
        gradients = backward(self, *arguments)
        seen["grad_lse"], seen["grad_key"] = arguments[-1], gradients[1].clone()
        return gradients

    monkeypatch.setattr(type(provider), "backward", recorded)
    results = fused(*inputs, upstream, provider="flash_attn_4")
    changed = (results[3] != seen["grad_key"]).any(dim=1).any(dim=-1)  # [B, L]
    queries = inputs[3]
    named = torch.zeros_like(changed)
    for sequence, key_set in zip(queries.sequence, queries.key_set, strict=True):
        named[sequence, queries.key_sets[key_set][queries.key_sets[key_set] >= 0]] = True
    assert torch.equal(changed, named)
    tokens = torch.zeros(seen["grad_lse"].shape[::2], dtype=torch.bool)
    tokens[queries.sequence, queries.position] = True
    assert torch.equal(seen["grad_lse"].ne(0).any(dim=1), tokens)


@pytest.mark.parametrize("provider", ["torch_cpu", *LIBRARIES])
def test_repeatable(provider, stand_ins):  # noqa: F811
    *inputs, upstream = make(CASES["dense"])
    first, second = (fused(*inputs, upstream, provider=provider) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unwanted_gradients_are_not_made():
    query, key, value, queries, _, _ = make(CASES["dense"])
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((query, key, value))]
        output, maps = flash_noun_attention(*leaves, queries)
        (output.sum() + maps.sum()).backward()
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]
    output, maps = flash_noun_attention(query, key, value, queries)
    assert not output.requires_grad and not maps.requires_grad


def test_second_derivative_is_refused():
    query, key, value, queries, _, _ = make(CASES["dense"])
    output, maps = flash_noun_attention(query.requires_grad_(), key, value, queries)
    (grad,) = torch.autograd.grad(output.square().sum() + maps.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_rows():
    query, key, value, _, _, _ = make(CASES["dense"])
    queries = make_queries([], [[1, 2]])
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output, maps = flash_noun_attention(*leaves, queries)
    assert maps.shape == (0, 2)
    (output.sum() + maps.sum()).backward()
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    gradients = torch.autograd.grad(expected.sum(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    maps = flash_noun_attention(*leaves, queries)[1]
    assert all(not g.any() for g in torch.autograd.grad(maps.sum(), leaves[:2]))


@pytest.mark.parametrize("which", USES)
def test_checkpointing_without_reentrance(which):
    *inputs, upstream = make(CASES["dense"])
    upstream = use(upstream, which)
    query, key, value, queries, _ = inputs
    expected = fused(*inputs, upstream, provider="torch_cpu")
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    results = checkpoint(lambda *x: flash_noun_attention(*x, queries), *leaves, use_reentrant=False)
    total = sum((r * u.to(r.dtype)).sum() for r, u in zip(results, upstream, strict=True) if u is not None)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    for g, e in zip(gradients, expected[2:], strict=True):
        assert torch.equal(torch.zeros_like(e) if g is None else g, e)


def test_autocast_casts_as_the_attention_does():
    query, key, value, queries, _, _ = make(CASES["dense"])
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, maps = flash_noun_attention(*leaves, queries)
        plain = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    assert output.dtype == plain.dtype == torch.bfloat16 and maps.dtype == torch.float32
    assert torch.equal(output, plain)
    (output.float().sum() + maps.sum()).backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


def test_compiled():
    *inputs, upstream = make(CASES["dense"])
    query, key, value, queries, _ = inputs
    expected = fused(*inputs, upstream, provider="torch_cpu")

    def function(*x):
        output, maps = flash_noun_attention(*x, queries)
        return output * 1.0, maps * 1.0

    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    results = torch.compile(function, backend="aot_eager")(*leaves)
    total = sum((r * u.to(r.dtype)).sum() for r, u in zip(results, upstream, strict=True))
    for a, e in zip((*results, *torch.autograd.grad(total, leaves)), expected, strict=True):
        torch.testing.assert_close(a, e)


def saved_tensors(function):
    seen = []

    def pack(tensor):
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function()
    return results, seen


def test_nothing_is_kept_beyond_what_the_attention_keeps():
    query, key, value, queries, _, _ = make(CASES["group of 7"])
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    (output, _), seen = saved_tensors(lambda: flash_noun_attention(*leaves, queries))
    known = {x.data_ptr() for x in (*leaves, output)}
    (lse,) = [tensor for tensor in seen if tensor.data_ptr() not in known]
    assert lse.shape == query.shape[:3]


# what is refused


def refusal(case="dense", **options):
    """The reason, None if there is none."""
    query, key, value, queries, given, _ = make(CASES[case])
    try:
        flash_noun_attention(query, key, value, queries, **given | options)
    except Unsupported as reason:
        return str(reason)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("packed", {}, "only as a mask"),
        ("window", {}, "only as a mask"),
        ("dense", {"provider": "torch_cuda"}, "needs CUDA tensors, not cpu"),
        ("dense", {"provider": "flash_attn_2"}, "needs CUDA tensors, not cpu"),
        ("dense", {"backend": "eager"}, "eager"),
        ("dense", {"mask": torch.ones(2, 1, 41, 41)}, "the mask must be bool"),
        ("dense", {"mask": torch.ones(1, 41, 41).bool()}, "the mask must be bool"),
        ("packed", {"max_length": None}, "with max_length"),
    ],
)
def test_refusals(case, options, message):
    assert message in refusal(case, **options)


@pytest.mark.usefixtures("stand_ins")
def test_refusals_of_the_libraries(monkeypatch):
    for provider in LIBRARIES:
        assert "no mask" in refusal(provider=provider, mask=torch.ones(2, 1, 41, 41).bool())
        assert refusal(provider=provider) is None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert "flash-attn-3 cannot be used" in refusal(provider="flash_attn_3")
    query, key, value, queries, _, _ = make(CASES["dense"])
    odd = [x[..., :12] for x in (query, key, value)]
    with pytest.raises(Unsupported, match="multiple of 8"):
        flash_noun_attention(*odd, queries, provider="flash_attn_2")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("provider", "taken", "refused", "message"),
    [
        ("flash_attn_2", [(8, 0), (8, 9), (9, 0), (12, 0)], [(7, 5)], "flash-attn runs on Ampere or newer"),
        ("flash_attn_3", [(9, 0)], [(8, 0), (8, 9), (10, 0), (12, 0)], "flash-attn-3 runs on Hopper"),
        ("flash_attn_4", [(9, 0), (10, 0), (12, 0)], [(8, 0), (8, 9)], "flash-attn-4 runs on Hopper or newer"),
    ],
)
def test_gpus_that_a_library_has_no_kernels_for_are_refused(provider, taken, refused, message, monkeypatch):
    for capability in taken + refused:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, given=capability: given)
        if capability in taken:
            assert refusal(provider=provider) is None
        else:
            reason = refusal(provider=provider)
            assert message in reason and "{}.{}".format(*capability) in reason


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([(0, 20, 0, 21, 0)], {"mask": (torch.ones(41, 41).tril().triu(-5) > 0)[None, None]}, "row 0 has.*token 20"),
        ([(0, 20, 13, 21, 0), (0, 35, 13, 36, 0)], {"provider": "flash_attn_2"}, r"row 1 has the keys \[13, 36\)"),
        ([(0, 20, 0, 21, 0)], {"provider": "flash_attn_2", "window": 5}, r"row 0 has the keys \[0, 21\)"),
    ],
)
def test_rows_that_are_not_those_of_the_attention_are_refused(rows, options, message):
    query, key, value, _, _, _ = make(CASES["group of 7"])
    if rows[0][2]:
        options = options | CASES["packed"][-1]
    with pytest.raises(Unsupported, match=message):
        flash_noun_attention(query, key, value, make_queries(rows, [[1, 2]]), **options)


def test_unknown_provider():
    with pytest.raises(ValueError, match="unknown flash attention provider 'flash_attn_5'.*torch_cpu"):
        refusal(provider="flash_attn_5")


# signatures


def parameters(function):
    return list(flash_attn_providers.get_parameters(function))


@pytest.mark.parametrize("name", ["_flash_attention_forward", "_flash_attention_backward"])
def test_signatures_of_torch(name):
    ours = parameters(getattr(flash_stand_ins.aten(), name))
    theirs = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
    # torch 2.11 has no block_table and num_splits yet
    assert theirs == ours or theirs == [name for name in ours if name not in ("block_table", "num_splits")]


@pytest.mark.parametrize(
    ("module", "stand_in"),
    [
        ("flash_attn.flash_attn_interface", flash_stand_ins.flash_attn_2),
        ("flash_attn_interface", flash_stand_ins.flash_attn_3),
        ("flash_attn.cute.interface", flash_stand_ins.flash_attn_4),
    ],
)
def test_signatures_of_what_is_installed(module, stand_in):
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{module} is not installed")
    installed = importlib.import_module(module)
    for name, function in vars(stand_in()).items():
        assert set(inspect.signature(function).parameters) <= set(parameters(getattr(installed, name)))
