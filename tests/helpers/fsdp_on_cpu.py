"""Training runs with real FSDP2 on the CPU, where accelerate would take DDP: the program that torchrun starts in tests.

torchrun --nproc-per-node 2 tests/helpers/fsdp_on_cpu.py run.yaml [--resume] other.yaml …
"""

import logging
import os
import sys

import accelerate.state
import torch
from accelerate.utils import DistributedType

_init = accelerate.state.PartialState.__init__


def init_like_gpus(self, *args, **kwargs) -> None:
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def main(words: list[str]) -> None:
    """Run the configurations in their order; `--resume` belongs to the one before it."""
    from swim_fast.config import load_config
    from swim_fast.training.run import train

    logging.basicConfig(level=logging.WARNING)
    accelerate.state.PartialState.__init__ = init_like_gpus
    for word, behind in zip(words, [*words[1:], ""], strict=True):
        if word != "--resume":
            train(load_config(word), resume=behind == "--resume")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, ended in no order, at times abort a process that has done its work


if __name__ == "__main__":
    main(sys.argv[1:])
