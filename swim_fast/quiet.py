"""Library messages that are no news to the user, held back; warnings and errors of anything else stay."""

import logging
import os
import sys

_NO_NEWS = {  # logger -> beginnings of messages
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # 4 bits on a CPU: the slow way serves
    "DeepSpeed": ("Setting accelerator to CPU",),  # `train` says where it runs
    "transformers.training_args": (
        "When using FSDP, prefer `fsdp_config['activation_checkpointing']`",
    ),  # refused here
    "transformers.trainer_utils": ("The tokenizer has new PAD/BOS/EOS tokens",),  # which it then takes, as it must
}


def quiet_libraries() -> None:
    """Hold back what libraries say at import, what `_NO_NEWS` lists and, where nobody watches, their progress bars.

    Variables that are set already are left alone. Heavy libraries are not imported, so this comes before them.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorBoard imports TensorFlow where it finds it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else the tokenizer warns in every forked data worker
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of downloads and of loading weights
    for name, beginnings in _NO_NEWS.items():
        logging.getLogger(name).addFilter(_Filter(beginnings))


class _Filter(logging.Filter):
    """Drops messages by how they begin."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def __eq__(self, other) -> bool:  # a logger takes equal filters once
        return isinstance(other, _Filter) and other.beginnings == self.beginnings

    __hash__ = None

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)
