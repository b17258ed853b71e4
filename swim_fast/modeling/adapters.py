"""Low-rank adapters in place of the weights (LoRA, arXiv 2106.09685), and the plain checkpoint that they merge into.

The adapters are put into the model itself, by transformers' own `add_adapter`: its class, the paths of its parts and
`generate` stay as they were, and what `save_pretrained` then writes are the adapters alone, in the folder format that
`peft.PeftModel.from_pretrained(base, folder)` loads. A new adapter adds exactly zero, so that maps and losses begin as
those of the base model.

With `quantize` the frozen linear layers are kept in 4 or 8 bits by bitsandbytes (QLoRA, arXiv 2305.14314), those of the
visual module and the head not. Such a base cannot take up the adapters: `merge_adapters` always merges into the base
as it is on disk, loaded again without quantisation.
"""

import difflib
import re
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from swim_fast.modeling.families import FAMILIES, family_of
from swim_fast.modeling.freezing import parameters_of_parts

NAME = "default"  # of the adapter, as peft calls one that nobody named
PREFIX = "base_model.model."  # of the names in an adapter's file: those below peft's wrapper


def quantization_config(quantize: str, compute_dtype: torch.dtype):
    """`transformers.BitsAndBytesConfig` for a base model.

    Args:
        quantize: "nf4" (4 bits, the scales quantised once more) or "int8".
        compute_dtype: what nf4 weights are turned back into for a product.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"model.lora.quantize: {quantize} needs bitsandbytes: pip install 'swim-fast[lora]'"
        ) from error
    from transformers import BitsAndBytesConfig

    whole = sorted({name for family in FAMILIES.values() for name in (family.visual, family.head)})
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=whole,
    )


def target_pattern(model: nn.Module, targets: list[str] | None) -> str:
    """Regular expression of the full names of the linear layers that get adapters, as peft takes it.

    Args:
        targets: names of linear layers, such as "q_proj". One that the decoder layers have means those, another one any
            layer of that name; further parts of the full name may go before it ("visual.gate_proj", "layers.3.q_proj").
            None: all linear layers of the decoder layers.

    Raises:
        ValueError: a name that no linear layer has, or the head of a model whose embeddings are its weight.
    """
    family = family_of(model)
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
            near = difflib.get_close_matches(target.rpartition(".")[2], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the model has {', '.join(known)}"
            raise ValueError(f"model.lora.targets names {target!r}, but no linear layer is called that; {hint}")
        patterns.append(chosen)
    pattern = "|".join(patterns)
    if re.fullmatch(pattern, family.head) and model.config.tie_word_embeddings:
        raise ValueError(
            f"model.lora.targets names {family.head!r}, whose weight is also that of this model's embeddings, so that "
            "adapters cannot be merged into it; remove it"
        )
    return pattern


def add_adapters(model: nn.Module, options, frozen: list[str], seed: int) -> None:
    """Freeze a model and give its linear layers adapters that are trained, in fp32 beside weights of 16 or fewer bits.

    Args:
        model: a stock model of a supported family, attached or not, quantised or not.
        options: `swim_fast.config.LoraConfig`.
        frozen: parts that `freeze` is about to freeze.
        seed: of the adapters' first halves; the second ones begin as zeros.

    Raises:
        ValueError: unknown targets, or targets in a part that is to be frozen.
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("model.lora needs peft: pip install 'swim-fast[lora]'") from error
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=target_pattern(model, options.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:  # of 16 bits in a model of such, where small steps would be rounded away
            parameter.data = parameter.data.float()
    config.base_model_name_or_path = model.config._name_or_path  # for those who load the folder alone
    for part in frozen:
        if any(p.requires_grad for p in parameters_of_parts(model).get(part, ())):
            raise ValueError(
                f"model.lora.targets puts adapters into the {part}, which model.freeze names: remove one of the two"
            )


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` has been at work on the model."""
    return getattr(model, "_hf_peft_config_loaded", False)


def load_adapters(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Set the adapters of a model to those of a checkpoint folder.

    Raises:
        ValueError: the folder holds no adapters, or those of other layers or another rank.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapters (no {path.name}), but model.lora is set: is it of another run?")
    saved = {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}
    wanted = {name: value.shape for name, value in model.get_adapter_state_dict(NAME).items()}
    if wanted != {name: value.shape for name, value in saved.items()}:
        raise ValueError(
            f"the adapters in {folder} are on other layers or of another rank than model.lora says: another run?"
        )
    set_peft_model_state_dict(model, saved, NAME)


def merge_adapters(
    base: str, adapter: str | PathLike[str], folder: str | PathLike[str], dtype: str | torch.dtype = "auto"
) -> None:
    """Merge adapters into the weights of their base: a plain checkpoint that needs neither peft nor this project.

    Args:
        base: folder or hub name of the checkpoint that the adapters were trained on; loaded in host memory and, however
            it was trained on, without quantisation.
        adapter: folder of the adapters.
        folder: where the weights, the configuration and the processor go.
        dtype: of the weights; "auto": as they are saved.
    """
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
