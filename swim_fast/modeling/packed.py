"""Packed batches, several samples in one sequence, on an unmodified Hugging Face model."""

from torch import nn

from swim_fast.modeling.families import family_of

_OF_LANGUAGE_MODEL = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def accept_packed_batches(model: nn.Module) -> None:
    """Let a model take the batches that `swim_fast.data.batch.collation.Collator` packs, whatever its attention.

    transformers sees from the position ids which tokens belong together, but only without a key/value cache, which is
    therefore left out; and the lengths of the samples, which flash attention wants to be told, reach the language
    model alone: otherwise they are handed to the vision tower too, and contradict its own.
    """
    family = family_of(model)

    def before_visual(module, args, kwargs):
        return args, {key: value for key, value in kwargs.items() if key not in _OF_LANGUAGE_MODEL}

    def before_language_model(module, args, kwargs):
        packed = kwargs.get("cu_seq_lens_q") is not None
        return args, kwargs | {"use_cache": False} if packed else kwargs

    model.get_submodule(family.visual).register_forward_pre_hook(before_visual, with_kwargs=True)
    model.get_submodule(family.language_model).register_forward_pre_hook(before_language_model, with_kwargs=True)
