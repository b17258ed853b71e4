"""The direction of the imports between rooms."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room -> the rooms that it may import, itself and `errors` understood, or (after "not") those that it may not.
RULES = {
    "kernels/swim_kernels": "not swim_fast",
    "swim_fast/options.py": "",
    "swim_fast/jobs.py": "options",
    "swim_fast/command_line.py": "options",
    "swim_fast/config.py": "options recipes",
    "swim_fast/files.py": "",
    "swim_fast/loss": "options swim_kernels",
    "swim_fast/modeling": "options swim_kernels",
    "swim_fast/data": "not modeling training inference evaluation config",
    "swim_fast/llm": "files options",
    "swim_fast/nl_refer/english": "options",
    "swim_fast/viz": "files",
    "swim_fast/evaluation": "not nl_refer",
}


def imported(path: Path) -> set[str]:
    """The modules of the project that the files below a path import, at the top or in a function."""
    names = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: a relative import"
                names |= {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("swim_fast", "swim_kernels")}


def below(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("room", RULES)
def test_imports_go_one_way(room):
    unwanted, words = RULES[room].startswith("not "), RULES[room].removeprefix("not ").split()
    modules = [word if word.startswith("swim_") else f"swim_fast.{word}" for word in words]
    if not unwanted:
        modules += ["swim_fast.errors", room.removesuffix(".py").replace("/", ".")]
    found = imported(ROOT / room)
    assert found or room in ("swim_fast/options.py", "swim_fast/nl_refer/english")
    assert sorted(name for name in found if below(name, modules) == unwanted) == []


def test_no_circle():
    """No module imports itself by way of others, not even in a function."""
    files = {}
    for folder, package in ((ROOT, "swim_fast"), (ROOT / "kernels", "swim_kernels")):
        for file in (folder / package).rglob("*.py"):
            files[".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")] = file
    imports = {}
    for name, file in files.items():
        imports[name] = found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {part if part in files else node.module for part in parts}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        found &= files.keys() - {name}
    assert len(list(TopologicalSorter(imports).static_order())) == len(files) > 100  # raises CycleError
