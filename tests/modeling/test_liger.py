"""Liger's functions in the modules of one model. Its kernels need CUDA: functions that record and compute stand in."""

import copy
import importlib.metadata
import inspect
import logging
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from swim_fast.config import load_config
from swim_fast.demo.tiny_model import ModelSize, build_model, train_tokenizer
from swim_fast.modeling import attach_noun_attention, liger
from swim_fast.modeling.liger import apply_liger
from swim_kernels import NounQueries

pytestmark = pytest.mark.needs("liger_kernel")

LAYERS, BLOCKS = 4, 2  # of the tiny language model, of its vision tower
REPLACED = [
    "language model: SwiGLU × 4",
    "language model: RMSNorm × 9",
    "vision tower: RMSNorm × 5",
    "vision tower: SwiGLU × 2",
    "language model: rotary embedding × 4",
]
calls = Counter()


class LigerRMSNormFunction:
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        raise AssertionError("only its arguments count")

    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode, in_place, row_mode) == (0.0, "llama", False, None)
        calls["rms_norm"] += 1
        x = X.float()
        return W * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(X.dtype)


class LigerSiLUMulFunction:
    @staticmethod
    def forward(ctx, a, b, gate_multiplier=1.0, down_multiplier=1.0):
        raise AssertionError("only its arguments count")

    @staticmethod
    def apply(a, b, gate_multiplier=1.0, down_multiplier=1.0):
        assert gate_multiplier == down_multiplier == 1.0
        calls["swiglu"] += 1
        return F.silu(a) * b


class LigerRopeFunction:
    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        raise AssertionError("only its arguments count")

    @staticmethod
    def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        """As Liger computes it: the left halves of cos and sin, for both halves of a head."""
        assert position_ids is None and rotary_dim is None and unsqueeze_dim == 1
        assert cos.shape in {(1, *q.shape[2:]), (len(q), *q.shape[2:])} and q.ndim == k.ndim == 4
        calls["rotary"] += 1
        half = q.shape[-1] // 2
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]

        def rotate(x):
            left, right = x[..., :half], x[..., half:]
            return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

        return rotate(q), rotate(k)


RECORDERS = (LigerRMSNormFunction, LigerSiLUMulFunction, LigerRopeFunction)


@pytest.fixture(autouse=True)
def recorders(monkeypatch, caplog):
    import liger_kernel.ops

    for recorder in RECORDERS:
        monkeypatch.setattr(liger_kernel.ops, recorder.__name__, recorder)
    calls.clear()
    caplog.set_level(logging.INFO)


@pytest.fixture
def inputs(stock):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 250, (2, 31), generator=generator)
    ids[:, 5:17] = stock.config.video_token_id
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(31) < torch.tensor([[31], [26]])).long(),
        "mm_token_type_ids": (ids == stock.config.video_token_id).int() * 2,
        "pixel_values_videos": torch.randn(2 * 2 * 4 * 6, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 6]] * 2),
        "second_per_grid_ts": [1.0, 1.0],
    }


def queries():
    position = torch.tensor([30, 28, 25])
    keys = torch.arange(5, 17)
    sequence = torch.tensor([0, 0, 1])
    return NounQueries(sequence, position, torch.zeros(3).long(), position + 1, sequence, torch.stack([keys, keys]))


def results(model, inputs):
    """Logits, maps if the model answers any, and gradients of every weight."""
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    maps = outputs.attentions or ()
    upstream = torch.randn(outputs.logits.shape, generator=torch.Generator().manual_seed(2))
    ((outputs.logits * upstream).sum() + sum((m * m).sum() for m in maps)).backward()
    return [outputs.logits.detach(), *maps, *(p.grad for p in model.parameters())]


def assert_same(mine, theirs):
    for found, truth in zip(mine, theirs, strict=True):
        assert (found - truth).norm() <= 1e-4 * truth.norm() + 1e-4


def test_the_recorders_have_the_installed_arguments(monkeypatch):
    monkeypatch.undo()
    import liger_kernel.ops

    def arguments(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    for recorder in RECORDERS:
        assert arguments(recorder.forward) == arguments(getattr(liger_kernel.ops, recorder.__name__).forward)
        assert arguments(recorder.apply) == arguments(recorder.forward)[1:]


def test_each_replacement_runs_and_computes_the_same(model, stock, inputs, caplog):
    expected = results(stock, inputs)
    assert apply_liger(model, "cuda") == REPLACED
    assert caplog.messages == ["Liger computes: " + ", ".join(REPLACED)]
    assert_same(results(model, inputs), expected)
    assert calls == {"rms_norm": 9 + 5, "swiglu": LAYERS + BLOCKS, "rotary": LAYERS}


def test_other_models_of_the_process_stay_as_they_are(model, stock, inputs):
    apply_liger(model, torch.device("cuda", 0))
    plain = stock(**inputs).logits
    fresh = build_model(train_tokenizer(["a dog and a cat"] * 4, 300), ModelSize(num_layers=4), seed=0)
    assert torch.equal(fresh(**inputs).logits, plain)
    assert not calls


def test_a_copy_computes_with_its_own_weights(model, inputs):
    apply_liger(model, "cuda")
    before = model(**inputs).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(**inputs).logits.any()
    assert torch.equal(model(**inputs).logits, before)
    assert calls["rotary"] == 3 * LAYERS


@pytest.mark.parametrize("first", ["attached", "replaced"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_noun_attention_goes_on_working(model, stock, inputs, first, attention):
    stock = copy.deepcopy(stock)
    for each in (model, stock):
        each.set_attn_implementation(attention)
    attach_noun_attention(stock, [1, 3])
    steps = [lambda: attach_noun_attention(model, [1, 3]), lambda: apply_liger(model, "cuda")]
    for step in steps if first == "attached" else steps[::-1]:
        step()
    given = inputs | {"noun_queries": queries()}
    expected = results(stock, given)
    assert not calls
    found = results(model, given)
    assert len(model(**given).attentions) == 2
    assert_same(found, expected)
    assert calls["rotary"] == 2 * LAYERS


def test_activation_checkpointing_and_generation(model, stock, inputs):
    apply_liger(model, "cuda")
    one = {"input_ids": inputs["input_ids"][:1, 17:]}
    assert torch.equal(model.generate(**one, max_new_tokens=4), stock.generate(**one, max_new_tokens=4))
    stock = copy.deepcopy(stock)
    for each in (model, stock):
        each.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(results(model, inputs), results(stock, inputs))


def test_what_is_saved_is_plain(model, stock, tmp_path):
    apply_liger(model, "cuda")
    assert list(model.state_dict()) == list(stock.state_dict())
    for name, each in (("mine", model), ("theirs", stock)):
        each.save_pretrained(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "mine" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_layers_that_are_not_what_liger_computes_are_left(model, inputs):
    for layer in model.model.language_model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    expected = model(**inputs).logits
    assert "language model: SwiGLU × 4" not in apply_liger(model, "cuda")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert calls["swiglu"] == BLOCKS


def test_an_attention_that_calls_another_function_is_left_and_told(model, caplog, monkeypatch):
    monkeypatch.setattr(liger, "_ROTARY", "apply_other_rotary_pos_emb")
    assert apply_liger(model, "cuda") == REPLACED[:-1]
    assert "Liger's rotary embedding is not used: the attention calls no apply_other_rotary_pos_emb" in caplog.text


@pytest.mark.parametrize(
    ("device", "version", "message"),
    [
        ("cpu", "0.8.5", "Liger is not used: its kernels need CUDA, and the model is on cpu"),
        ("cuda", None, "liger-kernel is not installed: pip install 'liger-kernel>=0.8.5,<0.9'"),
        ("cuda", "0.8.4", "liger-kernel is 0.8.4, and must be at least 0.8.5 and below 0.9"),
        ("cuda", "0.9.0", "liger-kernel is 0.9.0"),
    ],
)
def test_where_it_cannot_run_nothing_is_replaced(model, inputs, caplog, monkeypatch, device, version, message):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    liger._installed_version.cache_clear()
    assert apply_liger(model, device) == []
    liger._installed_version.cache_clear()
    model(**inputs)
    assert not calls
    (line,) = caplog.messages
    assert message in line


@pytest.mark.parametrize("use_liger", [True, False])
def test_model_liger_switches_it(stock, tmp_path, monkeypatch, use_liger):
    from swim_fast.training.run import load_model

    asked = []
    monkeypatch.setattr(liger, "get_refusal", asked.append)  # answers None: it can be used
    monkeypatch.setattr("swim_fast.inference.loading.load_processor", lambda path: None)
    monkeypatch.setattr("swim_fast.training.run.build_sample_builder", lambda config, processor: None)
    stock.save_pretrained(tmp_path / "model")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tmp_path / 'model'}, liger: {str(use_liger).lower()}}}\ndata: {{}}\n")
    model, _ = load_model(load_config(config))
    assert asked == (["cpu"] if use_liger and not torch.cuda.is_available() else ["cuda"] if use_liger else [])
    replaced = [name for name, module in model.model.named_modules() if "forward" in vars(module)]
    assert len(replaced) == (9 + 5 + LAYERS + BLOCKS + LAYERS if use_liger else 0)
    assert model._text_loss.use_liger is use_liger
