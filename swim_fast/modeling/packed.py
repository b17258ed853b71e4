"""Packed batches, several samples in one sequence, on an unmodified Hugging Face model."""

from torch import nn

from swim_fast.errors import OptionError
from swim_fast.families import get_family
from swim_fast.modeling.hooks import add_keyword_step, leave_out_cache


def accept_packed_batches(model: nn.Module) -> None:
    """Let a model take the batches that `swim_fast.data.batch.collation.Collator` packs, whatever its attention.

    transformers sees from the position ids which tokens belong together, but only without a key/value cache, which is
    therefore left out. The lengths of the samples, which flash attention wants to be told, reach the language model
    alone: the vision tower has lengths of its own.

    Raises:
        OptionError: a family of models whose samples cannot be packed.
    """
    if not get_family(model).packable:
        raise OptionError(f"samples of {get_family(model).name} cannot be packed: leave out data.max_tokens_per_batch")
    add_keyword_step(model, "packed", _leave_out_cache)
    leave_out_cache(model, "packed", "cu_seq_lens_q")


def _leave_out_cache(language_model: nn.Module, kwargs: dict) -> dict:
    return kwargs | {"use_cache": False} if kwargs.get("cu_seq_lens_q") is not None else kwargs
