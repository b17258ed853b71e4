"""Gradients of each family divided by FSDP2, of a video on one rank and text alone on the other; run by test_fsdp.py.

torchrun --nproc-per-node 2 tests/families/fsdp_ranks.py differences.json
"""

import importlib.util
import os
import sys
from types import SimpleNamespace

import accelerate
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from swim_fast.modeling.prepare import prepare_model
from swim_fast.training.fsdp import choose_layers
from tests.families.test_models import batch_of, losses_of, sample_of, text_sample
from tests.families.tiny import MAKERS, NEEDS, tiny
from tests.helpers import fsdp_on_cpu
from tests.helpers.ranks import write_and_end


def loss_of(model, batch):
    found = losses_of(model, batch)
    return found.loss + sum(one.square().sum() for one in found.attentions)


def compare(name: str, rank: int) -> float:
    """Return the largest difference of a gradient to that of one rank with both batches, in parts of its norm."""
    whole = prepare_model(tiny(name).build(), ranks=2)
    batches = [batch_of(name, whole, sample_of(name)), batch_of(name, whole, text_sample(name))]
    sum(loss_of(whole, batch) for batch in batches).backward()
    truth = {key: p.grad for key, p in whole.named_parameters()}

    model = prepare_model(tiny(name).build(), ranks=2, sharded=True)
    chosen = SimpleNamespace(fsdp=True, fsdp_plugin_args={})
    choose_layers(chosen, model)
    names = chosen.fsdp_plugin_args["transformer_cls_names_to_wrap"].split(",")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=names
    )
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.1))
    (2 * loss_of(model, batches[rank])).backward()  # ranks are averaged
    gradients = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.requires_grad}
    differences = [(grad - truth[key]).norm() / truth[key].norm().clamp(min=1e-3) for key, grad in gradients.items()]
    return torch.stack(differences).max().item()  # NaN where one is


def main(path: str) -> None:
    accelerate.state.PartialState.__init__ = fsdp_on_cpu.init_like_gpus
    rank, found = int(os.environ["RANK"]), {}
    for name in MAKERS:
        if importlib.util.find_spec(NEEDS.get(name, "torch")):
            found[name] = compare(name, rank)
    write_and_end(path, found)


if __name__ == "__main__":
    main(sys.argv[1])
