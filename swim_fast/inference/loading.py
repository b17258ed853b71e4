"""Load a checkpoint, here and nowhere else: processor, weights, and the run that made it."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from swim_fast.config import ConfigError, RunConfig, load_config
from swim_fast.errors import SEE_DOCTOR, OptionError, UserError
from swim_fast.modeling.positions import set_position_rule
from swim_fast.options import AsRun, Decoding, Inference, InputFile, Options, Sampling

logger = logging.getLogger(__name__)

DEFAULTS = Inference()
Job = TypeVar("Job", bound=AsRun)


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be used; the message names it and the reason."""


class Checkpoint(NamedTuple):
    """A stock model in evaluation mode, and its processor."""

    model: Any
    processor: Any


def load_checkpoint(path: str | Path, options: Inference = DEFAULTS, device: str | None = None) -> Checkpoint:
    """Load a checkpoint; see `load_processor` and `load_model`."""
    return Checkpoint(load_model(path, options, device), load_processor(path))


def load_processor(path: str | Path) -> Any:
    """Load the processor of a checkpoint that takes video or images.

    Args:
        path: folder, or name on the Hugging Face hub.

    Raises:
        CheckpointError: it cannot be loaded, takes neither video nor images, or no text.
    """
    from transformers import AutoProcessor

    with explain_failure(path):
        processor = AutoProcessor.from_pretrained(path)
    if not any(hasattr(processor, f"{kind}_processor") for kind in ("video", "image")):
        raise CheckpointError(f"model {str(path)!r} takes neither video nor images: it has no processor of either")
    if not processor.tokenizer("a")["input_ids"]:  # transformers makes an empty one where the file is missing
        raise CheckpointError(f"model {str(path)!r} cannot read text: its tokenizer.json is missing")
    return processor


def load_model(path: str | Path, options: Inference = DEFAULTS, device: str | None = None) -> Any:
    """Load the weights of a checkpoint as stock transformers do, in evaluation mode, and set its rule of position ids.

    Args:
        path: folder, or name on the Hugging Face hub.
        options: type of the weights, implementation of attention, rule of position ids, and device.
        device: used where `options` name none; None: the GPU if there is one.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or lacks weights.
        OptionError: the device cannot be used.
    """
    from transformers import AutoModelForImageTextToText

    device = options.device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    with explain_failure(path):
        model, found = AutoModelForImageTextToText.from_pretrained(
            path, dtype=options.dtype, attn_implementation=options.attention, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise CheckpointError(f"model {str(path)!r} lacks {len(missing)} weights, such as {missing[0]}")
    return set_position_rule(model.to(device).eval(), options.position_ids)


def trained_as(path: str | Path) -> RunConfig | None:
    """Return the configuration of the run that made a checkpoint; None if it lies beside none that can be read."""
    folder = Path(path)
    folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    file = next((at / "config.yaml" for at in folders if (at / "config.yaml").is_file()), None)
    if file is None:
        return None
    try:
        # without the sections that depend on the machine and the versions of the run
        config = load_config(file, ["training={}", "optimization={}"])
    except ConfigError as error:
        logger.warning("%s is not used, frames and layers are the defaults: %s", file, error)
        return None
    logger.info("options that are not given are those of training (%s)", file)
    return config


def find_run(options: AsRun) -> RunConfig | None:
    """Return the run that a job's samples are those of: `options.config`, else what `trained_as` finds.

    Raises:
        ConfigError: the named file cannot be used.
    """
    if options.config is not None:
        return load_config(options.config, ["training={}", "optimization={}"])
    return trained_as(options.model) if options.model is not None else None


def choose_sampling(options: Options, run: RunConfig | None) -> tuple[Sampling, Decoding]:
    """Return how samples are made: as given in `options`, else as in the run that made the checkpoint.

    A file that is one of the run's sources has the limits of pixels that it has there.

    Raises:
        OptionError: what was given contradicts what is taken from the run.
    """
    sampling, decoding = (run.sampling, run.decoding) if run else (Sampling(), Decoding())
    given = options.given().items()
    own = _own_sampling(run, options.file) if run and isinstance(options, InputFile) else {}
    return (
        sampling.replace(**own | {name: value for name, value in given if name in Sampling.model_fields}),
        decoding.replace(**{name: value for name, value in given if name in Decoding.model_fields}),
    )


def _own_sampling(run: RunConfig, file: str) -> dict[str, int]:
    """Return the options of sampling that a file has its own values of in a run, which may have it several times."""
    sources = [*run.data.train, *run.data.eval.values()]
    found = [source.own_sampling for source in sources if os.path.realpath(source.path) == os.path.realpath(file)]
    if any(own != found[0] for own in found):
        limits = " and ".join(map(str, found))
        raise OptionError(f"{file} is several sources of the run, of different limits ({limits}): give a copy of it")
    return found[0] if found else {}


def as_run(options: Job) -> Job:
    """Return the options of a job with those of samples that are not given taken from its run. Errors as above."""
    run = find_run(options)
    if run is None:
        return options
    found = {}
    for part in (*choose_sampling(options, run), run.supervision):
        found |= {name: value for name, value in part if name in type(options).model_fields}
    return options.replace(**{**found, **options.given()})


def choose_inference(options: Inference, run: RunConfig | None) -> Inference:
    """Return how a checkpoint is loaded: as given in `options`, and with the position ids of the run that made it."""
    inference = options.part(Inference)
    if run is None or "position_ids" in options.model_fields_set:
        return inference
    return inference.replace(position_ids=run.model.position_ids)


@contextmanager
def explain_failure(path: str | Path) -> Iterator[None]:
    """Say in a line what transformers cannot load; a damaged file may raise anything there."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, OSError | ValueError | ImportError) else repr(error)
        reason = textwrap.shorten(reason, 300) + SEE_DOCTOR * isinstance(error, ImportError)
        raise CheckpointError(f"model {str(path)!r} is no checkpoint that can be loaded: {reason}") from error
