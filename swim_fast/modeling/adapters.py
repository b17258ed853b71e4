"""Low-rank adapters trained in place of the weights (LoRA, arXiv 2106.09685), and the plain checkpoint they merge into.

transformers' own `add_adapter` puts them into the model: its class, the paths of its parts and `generate` stay as they
were. `save_pretrained` then writes the adapters alone, in the folder format that
`peft.PeftModel.from_pretrained(base, folder)` loads. A new adapter adds exactly zero, so that maps and losses start as
those of the base model.

With `quantize`, bitsandbytes keeps the frozen linear layers of the decoder in 4 or 8 bits (QLoRA, arXiv 2305.14314).
Adapters cannot be merged into such a base: `merge_adapters` always loads the base from disk without quantisation.
"""

import importlib.metadata
import re
from os import PathLike
from pathlib import Path

import torch
from packaging.version import Version
from torch import nn

from swim_fast.errors import MissingLibraryError, OptionError, nearest
from swim_fast.families import FAMILIES, get_family
from swim_fast.modeling.freezing import get_part_parameters

NAME = "default"  # of the adapter, as peft calls one that nobody named
LAST_WITH_PEFT_0_21 = "<5.24"  # releases of transformers; later ones need peft 0.22
PREFIX = "base_model.model."  # of the names in an adapter's file: those below peft's wrapper


def get_peft_refusal() -> str | None:
    """Return the reason why the installed transformers refuses the installed peft, None if it takes it."""
    from transformers.integrations.peft import MIN_PEFT_VERSION as LEAST

    transformers, peft = (importlib.metadata.version(name) for name in ("transformers", "peft"))
    if Version(peft) >= Version(LEAST):
        return None
    return (
        f"transformers {transformers} needs peft {LEAST} or later, and {peft} is installed: pip install "
        f"'peft>={LEAST}', or an earlier transformers, such as pip install 'transformers{LAST_WITH_PEFT_0_21}'"
    )


def build_quantization_config(quantize: str, compute_dtype: torch.dtype):
    """Return the `transformers.BitsAndBytesConfig` of a base model.

    Args:
        quantize: "nf4" (4 bits, the scales quantised too) or "int8".
        compute_dtype: of nf4 weights in a product.

    Raises:
        MissingLibraryError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            f"model.lora.quantize: {quantize} needs bitsandbytes: pip install 'swim-fast[lora]'"
        ) from error
    from transformers import BitsAndBytesConfig

    whole = sorted({name for family in FAMILIES for name in (family.visual, *family.mergers, family.head)})
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=whole,
    )


def build_target_pattern(model: nn.Module, targets: list[str] | None) -> str:
    """Return a regular expression of the full names of the linear layers that get adapters, as peft takes it.

    Args:
        targets: names of linear layers, such as "q_proj", or ends of their paths ("visual.gate_proj",
            "layers.3.q_proj"). A name that occurs in the decoder layers means those alone. None: all linear layers of
            the decoder layers.

    Raises:
        OptionError: a name that no linear layer has, or the head of a model whose embeddings are its weight.
    """
    family = get_family(model)
    decoder = re.escape(f"{family.language_model}.layers.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets is None:
        targets = list(dict.fromkeys(name.rpartition(".")[2] for name in linear if re.match(decoder, name)))
    patterns = []
    for target in targets:
        anywhere = r"\.".join(rf"(?:.*\.)?{re.escape(part)}" for part in target.split("."))
        choices = (decoder + anywhere, anywhere)
        chosen = next((c for c in choices if any(re.fullmatch(c, name) for name in linear)), None)
        if chosen is None:
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            hint = nearest(target.rpartition(".")[2], known)
            raise OptionError(f"model.lora.targets names {target!r}, but no linear layer is called that; {hint}")
        patterns.append(chosen)
    pattern = "|".join(patterns)
    if re.fullmatch(pattern, family.head) and model.config.tie_word_embeddings:
        raise OptionError(
            f"model.lora.targets names {family.head!r}, whose weight is also that of this model's embeddings, so that "
            "adapters cannot be merged into it; remove it"
        )
    return pattern


def add_adapters(model: nn.Module, options, frozen: list[str], seed: int) -> None:
    """Freeze a model and add adapters, in fp32, to its linear layers.

    Args:
        model: a stock model of a supported family, attached or not, quantised or not.
        options: an object with the fields of `swim_fast.options.Lora`.
        frozen: parts that `freeze` is about to freeze.
        seed: of the adapters' first matrices; the second ones start at zero.

    Raises:
        OptionError: unknown targets, or targets in a part that is to be frozen.
        MissingLibraryError: peft is not installed, or too old for the installed transformers.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingLibraryError("model.lora needs peft: pip install 'swim-fast[lora]'") from error
    if refusal := get_peft_refusal():
        raise MissingLibraryError(f"model.lora cannot be used: {refusal}")
    pattern = build_target_pattern(model, options.targets)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=pattern,
        exclude_modules=f"(?!(?:{pattern})$).*",  # of mixtures of experts peft keeps only the names at its ends
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:  # 16 bits would round small steps away
            parameter.data = parameter.data.float()
    config.base_model_name_or_path = model.config._name_or_path  # for loading the folder alone
    for part in frozen:
        if any(p.requires_grad for p in get_part_parameters(model).get(part, ())):
            raise OptionError(
                f"model.lora.targets puts adapters into the {part}, which model.freeze names: remove one of the two"
            )


def remove_adapters(model: nn.Module) -> None:
    """Undo `add_adapters`, except that the weights stay frozen; does nothing to a model without adapters."""
    if not has_adapters(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model._hf_peft_config_loaded, model.peft_config


def has_adapters(model: nn.Module) -> bool:
    """Return True for a model that `add_adapters` has changed."""
    return getattr(model, "_hf_peft_config_loaded", False)


def read_adapters(model: nn.Module, folder: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the adapters of a checkpoint folder by the names that they have in a model with such ones.

    Raises:
        OptionError: the folder holds no adapters, or adapters of other layers or another rank.
    """
    from safetensors.torch import load_file

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise OptionError(f"{folder} holds no adapters (no {path.name}), but model.lora is set: is it of another run?")
    saved = {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}
    wanted = {name: value.shape for name, value in model.get_adapter_state_dict(NAME).items()}
    if wanted != {name: value.shape for name, value in saved.items()}:
        raise OptionError(
            f"the adapters in {folder} are on other layers or of another rank than model.lora says: another run?"
        )
    own = {name.replace(f".{NAME}", ""): name for name in model.state_dict() if "lora_" in name}
    return {own[name]: value for name, value in saved.items()}


def merge_adapters(
    base: str, adapter: str | PathLike[str], folder: str | PathLike[str], dtype: str | torch.dtype = "auto"
) -> None:
    """Merge adapters into the weights of their base and save a plain one that needs neither peft nor swim_fast.

    Args:
        base: folder or hub name of the checkpoint that the adapters were trained on; loaded in host memory and without
            quantisation.
        adapter: folder of the adapters.
        folder: destination of weights, configuration and processor.
        dtype: of the weights; "auto": as they are saved.
    """
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
