"""Training with the Triton kernels is training with the torch operations."""

import pytest
import torch

from tests.training.conftest import checkpoint, history, records, run_here, weights, write_config  # noqa: F401

pytestmark = pytest.mark.interpreter  # on a GPU: tests/gpu/test_trainer.py
STEPS = 3
LOSSES = {"mask_loss": "mask_weight", "image_loss": "image_weight", "system_loss": "system_weight"}


def test_a_few_steps_give_the_same_losses_and_weights(write_config, checkpoint, launches):  # noqa: F811
    folders = {}
    for backend in ("torch", "triton"):
        before = len(launches)
        config = write_config(
            backend,
            attention_loss={"backend": backend, **dict.fromkeys(LOSSES.values(), 1.0)},
            training={"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9},
        )
        run_here(config)
        folders[backend] = config.with_suffix("")
        assert (len(launches) > before) == (backend == "triton")
    assert {"maps", "mass_partials"} <= {launch.name for launch in launches}
    for name in LOSSES:
        losses = {backend: [step[name] for step in history(folder)] for backend, folder in folders.items()}
        assert len(losses["torch"]) == STEPS and len(set(losses["torch"])) == STEPS
        assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-4)
    start, torch_end, triton_end = (weights(folder) for folder in (checkpoint, folders["torch"], folders["triton"]))
    moved = torch.cat([(torch_end[name] - value).flatten() for name, value in start.items()])
    apart = torch.cat([(torch_end[name] - triton_end[name]).flatten() for name in start])
    assert apart.norm() <= 1e-3 * moved.norm()
