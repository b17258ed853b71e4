"""Page of all keys of a configuration, docs/configuration.md: `python -m swim_fast.config_page`."""

import json
from typing import Any, Literal, get_args, get_origin

from swim_fast.config import RunConfig
from swim_fast.options import Lora, Options, Source, unwrap


def draw_page() -> str:
    """Return the text of the page."""
    lines = [
        "# Configuration",
        "",
        "One YAML file describes a run: `swim-fast train run.yaml`. `key.sub=value` behind it replaces single values.",
        "Every key is checked, and all mistakes of a file are told at once. `configs/` holds recipes to start from.",
        "",
        "This page is written by `python -m swim_fast.config_page > docs/configuration.md`.",
    ]
    for name, field in RunConfig.model_fields.items():
        if name == "training":
            lines += ["", "## `training`", "", f"{field.description} See the documentation of transformers."]
        else:
            lines += _section(f"`{name}`", unwrap(field.annotation))
    lines += _section("Files: `data.train[…]`, `data.eval.…`", Source) + _section("`model.lora`", Lora)
    return "\n".join(lines) + "\n"


def _section(title: str, options: type[Options]) -> list[str]:
    lines = [
        "",
        f"## {title}",
        "",
        options.__doc__.strip(),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in options.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        meaning = " ".join(field.description.split())
        lines.append(f"| `{name}` | {_type_text(field.annotation)} | {default} | {meaning} |")
    return lines


def _type_text(annotation: Any) -> str:
    kind = unwrap(annotation)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " · ".join(f"`{value}`" for value in arguments)
    if origin in (list, dict):
        return f"{origin.__name__} of {_type_text(arguments[-1])}"
    return "section" if issubclass(kind, Options) else f"`{kind.__name__}`"


if __name__ == "__main__":
    print(draw_page(), end="")
