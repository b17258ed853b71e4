"""The direction of the imports between rooms; every import counts, one in a function too."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room -> what it may import of the project, itself and `errors` understood, or (after "not") what it may not import.
RULES = {
    "swim_kernels": "",
    "swim_fast.options": "",
    "swim_fast.labels": "",
    "swim_fast.frame_shares": "",
    "swim_fast.position_ids": "",
    "swim_fast.jobs": "options",
    "swim_fast.command_line": "options",
    "swim_fast.config": "options recipes training_fields",
    "swim_fast.config_page": "config options",
    "swim_fast.files": "",
    "swim_fast.progress_bar": "",
    "swim_fast.loss": "options swim_kernels",
    "swim_fast.families": "",
    "swim_fast.modeling": "families frame_shares labels options position_ids swim_kernels",
    "swim_fast.data": "families frame_shares options jobs files progress_bar labels loss.targets loss.questions"
    " position_ids viz.record swim_kernels",
    "swim_fast.llm": "files options progress_bar",
    "swim_fast.nl_refer.english": "options",
    "swim_fast.importing": "options jobs data nl_refer progress_bar",  # names of objects are tagged as nl_refer does
    "swim_fast.viz": "files",
    "swim_fast.evaluation": "not nl_refer analysis",
    "swim_fast.analysis": "families options jobs files data loss modeling evaluation viz nl_refer.english swim_kernels",
}
# Room -> libraries that it does without.
LIGHT = {
    "swim_kernels": "transformers",
    "swim_fast.position_ids": "transformers numpy",
    "swim_fast.options": "torch transformers numpy",
    "swim_fast.jobs": "torch transformers numpy",
    "swim_fast.command_line": "torch transformers numpy",
    "swim_fast.config": "torch",
    "swim_fast.llm": "torch numpy",
    "swim_fast.nl_refer.english": "torch numpy",
    "swim_fast.viz": "transformers",
}


def below(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def imports_of(file: Path) -> set[str]:
    """Return the dotted names that a file imports: `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


FILES = {}
for folder, package in ((ROOT, "swim_fast"), (ROOT / "kernels", "swim_kernels")):
    for path in (folder / package).rglob("*.py"):
        FILES[".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")] = path
IMPORTS = {module: imports_of(file) for module, file in FILES.items()}


def imported(room: str) -> set[tuple[str, str]]:
    """Return (module, imported name) of every module of a room."""
    found = {(module, name) for module in FILES if below(module, [room]) for name in IMPORTS[module]}
    assert found, f"there is no {room}"
    return found


@pytest.mark.parametrize("room", RULES)
def test_imports_go_one_way(room):
    unwanted, words = RULES[room].startswith("not "), RULES[room].removeprefix("not ").split()
    modules = [word if word.startswith("swim_") else f"swim_fast.{word}" for word in words]
    if not unwanted:
        modules += ["swim_fast.errors", room]
    ours = {pair for pair in imported(room) if below(pair[1], ["swim_fast", "swim_kernels"])}
    assert sorted(pair for pair in ours if below(pair[1], modules) == unwanted) == []


@pytest.mark.parametrize("room", LIGHT)
def test_room_does_without(room):
    assert sorted(pair for pair in imported(room) if below(pair[1], LIGHT[room].split())) == []


def test_only_public_names_of_the_kernels_are_used():
    packages = [
        module for module, file in FILES.items() if file.name == "__init__.py" and below(module, ["swim_kernels"])
    ]
    packages = {package: importlib.import_module(package) for package in packages}
    public = {f"{package}.{name}" for package, found in packages.items() for name in getattr(found, "__all__", ())}
    used = {pair for pair in imported("swim_fast") if below(pair[1], ["swim_kernels"])}
    assert sorted(pair for pair in used if pair[1] not in public) == []


def test_an_op_is_entered_by_its_package():
    ops = {f"swim_kernels.{file.parent.name}" for file in FILES.values() if file.name in ("api.py", "node.py")}
    assert len(ops) == 5
    inner = {module for module in FILES for op in ops if below(module, [op]) and module not in (op, f"{op}.api")}
    wrong = {
        (module, name)
        for module, name in imported("swim_kernels")
        for op in ops
        if below(name, [op]) and not below(module, [op]) and below(name, [*inner])
    }
    assert sorted(wrong) == []


# What exists once -> the modules that hold it.
ONCE = {
    "swim_fast.modeling.liger.apply_liger": "modeling.prepare",
    "swim_fast.modeling.adapters.add_adapters": "modeling.prepare",
    "swim_fast.modeling.freezing.freeze": "modeling.prepare",
    "swim_fast.modeling.text_loss.attach_text_loss": "modeling.prepare",
    "swim_fast.modeling.packed.accept_packed_batches": "modeling.prepare",
    "swim_fast.modeling.offload.offload_activations": "modeling.prepare",
    "swim_fast.modeling.sequence_parallel.share_sequences": "modeling.prepare",
    # a run, the geometry of one, a checkpoint to ask, and the base that adapters are merged into
    "transformers.AutoModelForImageTextToText": "training.run training.dry_run.report inference.loading"
    " modeling.adapters",
}


@pytest.mark.parametrize("name", ONCE)
def test_a_model_is_loaded_and_changed_in_one_place(name):
    holders = [f"swim_fast.{word}" for word in ONCE[name].split()]
    assert sorted(module for module, used in imported("swim_fast") if used == name) == sorted(holders)


def test_no_circle():
    """No module imports itself by way of others, not even in a function."""
    edges = {}
    for module, names in IMPORTS.items():
        edges[module] = {name if name in FILES else name.rpartition(".")[0] for name in names} & FILES.keys() - {module}
    assert len(list(TopologicalSorter(edges).static_order())) == len(FILES) > 100  # raises CycleError
