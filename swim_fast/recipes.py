"""The recipes of the package, `configs/` in the repository: YAML files and the DeepSpeed files that they name."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
# Inside the package once it is installed, beside it in a checkout.
RECIPES = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def find_recipe(path: str | Path) -> Path:
    """Return the file at `path` or, where there is none, the recipe of that name.

    `demo`, `demo.yaml` and `configs/demo.yaml` all name the same recipe, and `configs/deepspeed/zero3.json` one of
    DeepSpeed. A path that is neither comes back as it is, for its reader to complain about.
    """
    path = Path(path)
    if not (path.is_file() or path.is_absolute() or ".." in path.parts):
        name = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
        for recipe in (RECIPES / name, RECIPES / f"{name}.yaml"):
            if recipe.is_file():
                return recipe
    return path
