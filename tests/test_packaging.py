"""What an installed package must bring along: recipes that are found from anywhere, types, one version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import swim_fast
from swim_fast.config import load_config
from swim_fast.recipes import RECIPES, find_recipe
from swim_fast.training.arguments import build_arguments

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml", "configs/demo", Path("configs/demo.yaml")])
def test_a_recipe_is_found_by_its_name(elsewhere, name):
    assert find_recipe(name) == RECIPES / "demo.yaml"
    assert load_config(name, ["training.max_steps=3"]).training["max_steps"] == 3


def test_a_file_comes_before_a_recipe(elsewhere):
    (elsewhere / "demo").mkdir()  # which is no file
    assert find_recipe("demo") == RECIPES / "demo.yaml"
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "demo.yaml").write_text("")
    assert find_recipe("configs/demo.yaml") == Path("configs/demo.yaml")


@pytest.mark.parametrize("name", ["absent", "absent.yaml", "/configs/demo.yaml", "../configs/demo.yaml"])
def test_what_is_no_recipe_stays_as_it_is(elsewhere, name):
    assert find_recipe(name) == Path(name)
    with pytest.raises(ValueError, match=f"cannot read {name}"):
        load_config(name)


def test_deepspeed_files_are_found_too(elsewhere):
    config = load_config("demo", ["training.deepspeed=configs/deepspeed/zero2.json"])
    assert config.deepspeed()["zero_optimization"]["stage"] == 2
    assert build_arguments(config).deepspeed == str(RECIPES / "deepspeed" / "zero2.json")
    with pytest.raises(ValueError, match="training.deepspeed is 'configs/deepspeed/zero9.json', which cannot be read"):
        load_config("demo", ["training.deepspeed=configs/deepspeed/zero9.json"])


def test_the_installed_package_brings_its_files(tmp_path):
    """As the wheel holds them: read from an empty folder, without the repository on the path."""
    build = [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path / "lib")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    installed = tmp_path / "lib"
    for file in (
        "swim_fast/py.typed",
        "swim_kernels/py.typed",
        "swim_fast/nl_refer/synonyms.tsv",
        "swim_fast/viz/record.html",
    ):
        assert (installed / file).is_file()
    recipes = installed / "swim_fast" / "configs"
    assert names(recipes) == names(ROOT / "configs") != []
    code = (
        "from swim_fast.config import load_config; from swim_fast.recipes import RECIPES\n"
        f"assert str(RECIPES) == {str(recipes)!r}\n"
        "load_config('demo')\n"
        "load_config('long_video').deepspeed()['zero_optimization']\n"
    )
    (tmp_path / "empty").mkdir()
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "empty", env=environment, check=True)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_flash_attn_is_built_beside_torch_and_its_tools():
    """Its build imports torch, which an isolated one does not have; DeepSpeed's is better off without CUDA's."""
    shown = subprocess.run(
        ["make", "--dry-run", "--assume-new=setup.py", "TORCH=cuda", "install-gpu"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    project, tools, flash, extras = (line for line in shown.splitlines() if "pip install" in line)
    assert project.endswith("-e '.[demo]'")
    assert {"wheel", "packaging", "ninja", "psutil"} <= set(tools.split()) and "setuptools>=77" in tools
    assert "MAX_JOBS=" in flash and "--no-build-isolation ./build/flash-attn/" in flash
    assert extras.endswith("-e '.[cuda,deepspeed]'") and "isolation" not in extras
    assert tools in shown.partition("pip download --no-build-isolation")[0]  # which runs flash-attn's setup.py, too
    assert "std=c++20" in shown.partition(flash)[0]


def dry_run(*words):
    """What `make` would do in a fresh clone."""
    command = ["make", "--dry-run", "--assume-new=setup.py", *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_demo_needs_no_development_tools_and_tests_add_them():
    demo, test = dry_run("TORCH=cuda", "demo"), dry_run("TORCH=cuda", "test")
    assert "'.[demo]'" in demo and "dev" not in demo and "download.pytorch.org" not in demo
    assert test.index("'.[demo]'") < test.index("'.[dev,demo]'") < test.index("pytest tests")


def test_torch_of_cpu_builds_is_tried_first_and_alone():
    cpu = dry_run("TORCH=cpu", "install")
    assert cpu.index("--index-url https://download.pytorch.org/whl/cpu") < cpu.index("'.[demo]'")
    assert "--timeout 5 --retries 0" in cpu and "PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= .venv/bin/pip" in cpu


def test_python_in_the_folder_above_a_clone_finds_the_package(tmp_path):
    """There the clone, a folder swim_fast without __init__.py, would pass for a namespace package."""
    (tmp_path / "swim_fast").mkdir()
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (code,) = re.findall(r"python -c '(import site;.*?)'", dry_run("TORCH=cuda", "install"), re.S)
    write = f"import site; site.getsitepackages = lambda: [{str(packages)!r}]\n{code}"
    subprocess.run([sys.executable, "-c", write], check=True)
    find = f"import site; site.addsitedir({str(packages)!r}); import swim_fast; print(swim_fast.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", find], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / "swim_fast" / "__init__.py")


def test_the_oldest_pair_is_the_one_of_setup():
    lowest = dict(re.findall(r'"(torch|triton)>=([\d.]+)', (ROOT / "setup.py").read_text()))
    pinned = dict(re.findall(r"^(torch|triton)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.M))
    assert pinned == {name: f"{version}.0" for name, version in lowest.items()} and len(pinned) == 2


def test_one_version():
    out = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert out.stdout.split()[-1] == swim_fast.__version__


def test_public_names():
    for name in swim_fast.__all__:
        assert getattr(swim_fast, name) is not None
    assert len(swim_fast.__all__) == 10
