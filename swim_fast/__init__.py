"""Teach video language models where to look, at flash-attention speed.

The public names load on first use, so that `import swim_fast` stays fast and needs no GPU library.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "attach_noun_attention": "swim_fast.modeling",
    "detach_noun_attention": "swim_fast.modeling",
    "mask_alignment_loss": "swim_fast.loss.mask_loss",
    "MaskTargets": "swim_fast.loss.mask_loss",
    "NounQueries": "swim_kernels",
    "SampleBuilder": "swim_fast.data.sample.builder",
    "Collator": "swim_fast.data.batch.collation",
    "load_config": "swim_fast.config",
    "train": "swim_fast.training.run",
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'swim_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return [*globals(), *__all__]
