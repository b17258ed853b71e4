"""Checks of what a job is given that come before torch, weights and generation; nothing heavy is imported."""

import json
import os
from pathlib import Path

from swim_fast.config import ConfigError, RunConfig
from swim_fast.errors import OptionError
from swim_fast.options import METRICS, Source


def check_model(path: str, name: str) -> None:
    """Refuse a model path that can only be local and is not there, which the hub would be asked for.

    A name on the hub is `owner/model`: the few single words there are models of text. What begins as a path does, has
    fewer or more parts, or lies in a folder that exists, is local.

    Args:
        name: of the option, for the message.

    Raises:
        OptionError: it is not there.
    """
    local = path.rstrip("/").count("/") != 1 or path.startswith(("/", "./", "../", "~", ".\\")) or path.endswith("/")
    if Path(path).exists() or not (local or Path(path).parent.is_dir()):
        return
    what = f"{name} {path!r} is no checkpoint that can be loaded: there is no such folder"
    raise OptionError(f"{what}{' (~ is not expanded here)' * path.startswith('~')}; correct the path")


def check_template(path: str, name: str) -> None:
    """Refuse a local checkpoint whose processor has no chat template, or one with a mistake in its syntax.

    How it renders a conversation is checked with the tokenizer. Names on the hub are passed over.

    Args:
        name: of the option, for the message.

    Raises:
        OptionError: naming the folder, and the file that has the mistake.
    """
    from jinja2 import Environment, TemplateSyntaxError

    folder = Path(path)
    if not (folder / "tokenizer_config.json").is_file():
        return
    template, file = None, folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    for other in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):  # of older transformers
        if not template:
            file = folder / other
            template = _read_key(file, "chat_template")
    if not template:
        raise OptionError(
            f"{name} {path!r} has no chat template, and questions cannot be put without; copy chat_template.jinja from "
            "the instruction-tuned model that it was made from"
        )
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template if isinstance(template, str) else "")
    except TemplateSyntaxError as error:
        if "unknown tag 'generation'" not in str(error):  # of transformers
            raise OptionError(f"{file}: line {error.lineno} is no valid Jinja: {error.message}; correct it") from error


def _read_key(file: Path, key: str) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None  # loading tells what is wrong with the file


def check_run(config: RunConfig) -> None:
    """Refuse a run whose model or files are not there, or whose best checkpoint is chosen by a metric of no tag.

    Raises:
        OptionError: naming key, path and remedy.
    """
    check_model(config.model.path, "model.path")
    check_template(config.model.path, "model.path")
    sources = {f"data.train[{index}]": source for index, source in enumerate(config.data.train)}
    for key, source in (sources | {f"data.eval.{name}": file for name, file in config.data.eval.items()}).items():
        _check_source(key, source)
    metric = str(config.training.get("metric_for_best_model")).removeprefix("eval_")
    for name, source in config.data.eval.items():
        if metric in [f"{name}_{kind}" for kind in ("mask_loss", *METRICS)] and not _has_tags(source.path):
            raise ConfigError(
                f"training.metric_for_best_model is {metric!r}, but {source.path} has no tagged noun to measure it on: "
                f"choose {name}_loss, or a file with tags"
            )


def _check_source(key: str, source: Source) -> None:
    if not Path(source.path).is_file():
        raise ConfigError(f"{key}.path is {source.path!r}, and there is no such file; correct the path")
    if not os.access(source.path, os.R_OK):
        raise ConfigError(f"{key}.path is {source.path!r}, which may not be read; change its permissions")
    if source.media is not None and not Path(source.media).is_dir():
        raise ConfigError(f"{key}.media is {source.media!r}, and there is no such folder; correct the path")


def _has_tags(path: str) -> bool:
    with open(path, "rb") as file:
        return any(b"<ins>" in line or b"u003cins" in line.lower() for line in file)


def check_output(folder: str, name: str) -> None:
    """Make a folder for results if it is absent.

    Raises:
        OptionError: it cannot be made or written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{name} is {folder!r}, which cannot be made: {error.strerror}; name another") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"{name} is {folder!r}, which cannot be written; make it writable or name another")


def check_input(path: str, name: str) -> None:
    """Refuse a file that is not there.

    Raises:
        OptionError: naming option and path.
    """
    if not Path(path).is_file():
        raise OptionError(f"{name} is {path!r}, and there is no such file; correct the path")


def check_judge(model: str | None) -> None:
    """Refuse to ask a judge without a key for its API.

    Raises:
        OptionError: there is none.
    """
    if model is not None and not os.environ.get("OPENAI_API_KEY"):
        raise OptionError("OPENAI_API_KEY is not set, and --judge-model needs it; a local server takes any value")
