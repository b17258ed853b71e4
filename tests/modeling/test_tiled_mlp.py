"""MLPs in tiles give the outputs and gradients of whole ones, for less memory."""

import copy

import pytest
import torch

from benchmarks.memory import count_allocations
from swim_fast.errors import OptionError
from swim_fast.modeling.prepare import prepare_model, restore_model
from swim_fast.modeling.tiled_mlp import tile_mlps
from tests.families.tiny import tiny


def step(model, length=301):
    ids = torch.randint(20, 250, (2, length), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tiles", [3, 400])  # the last ones empty
def test_tiles_are_the_whole(model, tiles, checkpointing):
    model.double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepare_model(model, layers=[])
    expected = step(model)
    tiled = tile_mlps(copy.deepcopy(model), tiles)
    for mine, one in zip(step(tiled), expected, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-9, atol=1e-12)
    restore_model(tiled)
    assert not any("forward" in vars(layer.mlp) for layer in tiled.model.language_model.layers)


def test_a_deep_copy_has_tiles_of_its_own(model):
    tiled = copy.deepcopy(prepare_model(model, layers=[], mlp_tiles=4))
    expected = step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for mine, one in zip(step(tiled), expected, strict=True):
        torch.testing.assert_close(mine, one)


def test_memory_of_a_step_falls(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.language_model.layers:  # as wide as those of real models are
        for name in ("gate_proj", "up_proj"):
            setattr(layer.mlp, name, torch.nn.Linear(layer.mlp.gate_proj.in_features, 2048, bias=False))
        layer.mlp.down_proj = torch.nn.Linear(2048, layer.mlp.down_proj.out_features, bias=False)
    prepare_model(model, layers=[])
    step(model)
    peaks = []
    for tiles in (1, 8):
        tile_mlps(model, tiles)
        with count_allocations() as counted:
            step(model, 2001)
        peaks.append(counted.peak)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("name", ["Qwen3-VL MoE"])
def test_experts_are_refused(name):
    with pytest.raises(OptionError, match="model.mlp_tiles is 2, and .* is no plain MLP"):
        prepare_model(tiny(name).build(), layers=[], mlp_tiles=2)
