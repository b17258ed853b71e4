"""Pages that need nothing else: HTML with its style and pictures inside, for screens, light or dark, and paper."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swim_fast.files import atomic_write


def write_page(path: str | os.PathLike[str], template: str, **values: Any) -> Path:
    """Fill a template of this folder, which extends `page.html`, and write it; all text is escaped.

    Args:
        path: HTML to write; its folder is made.
        template: name of the file.
        values: what the template names; one that it lacks is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    with atomic_write(path) as file:
        file.write(environment.get_template(template).render(values))
    return Path(path)


def data_uri(image: np.ndarray) -> str:
    """Return uint8 [H, W, 3] as the address of a picture that holds it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=88, subsampling=0)  # thin lines keep their colours
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
