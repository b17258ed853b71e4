"""Every command, YAML run and Python block of README.md and docs/ is executed, in a folder of small stand-ins.

A block under the marker `<!-- needs: … -->` is not executed; its commands are still parsed by the real command line.
"""

import json
import os
import re
import shutil
import subprocess

import pytest

from swim_fast.cli import build_parser, main
from swim_fast.config import load_config
from swim_fast.demo.run import run_demo
from tests.docs.pages import ROOT, blocks, commands

SHELL = blocks("bash", "console")
LAUNCHERS = ("torchrun", "deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages speak of: the demo's folder after a far too short `make demo`, records, benchmarks, a run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    there = os.getcwd()
    os.chdir(folder)
    try:
        short = ["training.max_steps=2", "training.eval_steps=2", "training.per_device_train_batch_size=2"]
        run_demo("configs/demo.yaml", [*short, "training.dataloader_num_workers=0"], train_clips=8, heldout_clips=2)
    finally:
        os.chdir(there)
    (folder / "runs/swim").symlink_to("demo/with_attention_loss")
    clips, media = folder / "runs/demo/data/clips", folder / "Panda-70M-part"
    media.mkdir()
    shutil.copy(next(clips.glob("heldout_*")), media / "a.mp4")
    question = {
        "video": str(media / "a.mp4"),
        "Question": "Is the box big or small?",
        "options": ["(A) big", "(B) small"],
    }
    write(folder / "refined-VideoRefer-Bench-Q.json", [question | {"Answer": "(A) big", "type": "Basic Questions"}])
    described = {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nDescribe the box."}]}
    described["conversations"].append({"from": "gpt", "value": "It is big."})
    write(folder / "refined-VideoRefer-Bench-D.json", [described])
    heldout = [json.loads(line) for line in (folder / "runs/demo/data/heldout.jsonl").read_text().splitlines()]
    raw = json.loads(json.dumps(heldout[0]))
    raw["conversations"] = [
        {"from": "human", "value": "<video>\nWhat is <object0><region> doing?"},
        {"from": "gpt", "value": "The brown dog is running across the yard."},
    ]
    write(folder / "videorefer.json", [raw])
    _write_sam2(folder / "mine", folder / "runs/demo/data", heldout[0])
    return folder


def _write_sam2(folder, data, record):
    """A clip, its masks as SAM 2 gives them, and the names of the objects."""
    folder.mkdir()
    shutil.copy(data / record["video"], folder / "clip.mp4")
    codes = {frame: {"1": mask["segmentation"]} for frame, mask in record["annotation"][0].items()}
    write(folder / "masks.json", codes)
    noun = record["conversations"][0]["value"].partition("<ins>")[2].partition("</ins>")[0]
    write(folder / "names.json", {"clip": {"1": noun}})


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture
def there(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path))
    return folder


def job(words: list[str]) -> list[str] | None:
    """Return the arguments of `swim-fast`, however it is started; None for another command."""
    if words[0] in ("swim-fast", ".venv/bin/swim-fast"):
        return words[1:]
    if words[0] in LAUNCHERS:
        return words[words.index("swim_fast.cli") + 1 :] if "swim_fast.cli" in words else None
    return None


def check_other(words: list[str]) -> None:
    """Check a command that is not `swim-fast`'s without running it."""
    name = words[0].removeprefix(".venv/bin/")
    if name == "make":
        targets = [word for word in words[1:] if "=" not in word]
        subprocess.run(["make", "--dry-run", "--silent", *targets], cwd=ROOT, check=True, capture_output=True)
    elif name == "pip":
        extras = re.fullmatch(r"\.\[(.+)\]", words[-1])[1].split(",")
        known = re.search(r"extras_require=\{(.*?)\n    \}", (ROOT / "setup.py").read_text(), re.S)[1]
        assert all(f'"{extra}":' in known for extra in extras), words
    elif words[1:3] == ["-m", "tests.helpers.pretend_gpu"]:
        check_other(words[3:])
    elif name == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if word and not word.startswith("-")), words
    elif name in ("python", "torchrun"):
        assert any((ROOT / word).is_file() for word in words if word.startswith("examples/")), words
    else:
        assert words in (["source", ".venv/bin/activate"],) or name == "accelerate", words


@pytest.fixture(scope="module")
def examined():
    """Commands that depend on the machine alone and were run for an earlier block; `doctor` takes most of a minute."""
    return []


@pytest.mark.filterwarnings("ignore:Glyph")  # an untrained model answers anything
@pytest.mark.parametrize("block", [b for b in SHELL if b.needs is None], ids=str)
def test_block_runs(block, there, examined, capsys):
    for words in commands(block):
        arguments = job(words)
        if arguments is None:
            check_other(words)
        elif arguments not in examined:
            assert main(arguments) == 0, (words, capsys.readouterr())
            if arguments == ["doctor"]:
                examined.append(arguments)


@pytest.mark.parametrize("block", [b for b in SHELL if b.needs], ids=str)
def test_block_that_needs_more_is_parsed(block):
    for words in commands(block):
        arguments = job(words)
        if arguments is None:
            check_other(words)
        else:
            parsed, rest = build_parser().parse_known_args(arguments)
            assert all(re.match(r"[a-z_.]+=", word) for word in rest), rest  # overrides behind an option
            if arguments[0] == "train":
                load_config(ROOT / parsed.config, [*parsed.overrides, *rest])


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_run_is_accepted(block, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(block.text, encoding="utf-8")
    from swim_fast.training.arguments import build_arguments

    build_arguments(load_config(path, ["training.use_cpu=true"]))


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_record_is_read(block, tmp_path):
    from swim_fast.data.source.records import RecordFile

    write(tmp_path / "records.json", [json.loads(block.text)])
    assert len(RecordFile(tmp_path / "records.json")[0].objects) == 1


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block, there):
    assert block.needs is None
    exec(compile(block.text, str(block), "exec"), {"__name__": "page"})


def test_no_block_is_overlooked():
    known = {"bash", "console", "yaml", "json", "python", ""}
    fences = [line for page in {b.page for b in SHELL} for line in (ROOT / page).read_text().splitlines()]
    fences = [line.strip().removeprefix("```") for line in fences if line.strip().startswith("```")]
    assert set(fences) <= known
    assert sum(len(commands(block)) for block in SHELL) > 30
