"""Model side: noun attention on stock Hugging Face models, model families, freezing, text loss."""

from swim_fast.modeling.noun_attention import attach_noun_attention, detach_noun_attention

__all__ = ["attach_noun_attention", "detach_noun_attention"]
