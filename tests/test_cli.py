"""The command line: exit codes and messages; what the jobs do is tested beside their code."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

import swim_fast
from swim_fast.cli import JOBS, build_parser, main
from swim_fast.demo.tiny_model import build_checkpoint
from swim_fast.jobs import Train
from swim_fast.options import Endpoint
from tests.training.conftest import TEXTS, record, square_clip, write_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    records = [record("clip.mp4", square_clip(folder / "clip.mp4", 0))]
    write_records(folder / "good.jsonl", records)
    write_records(folder / "bad.jsonl", [*records, record("absent.mp4", []), json.loads(json.dumps(records[0]))])
    build_checkpoint(folder / "model", TEXTS * 3, seed=0, vocab_size=300)
    return folder


def test_check_exits_with_0_or_1(folder, capsys):
    assert main(["data", "check", str(folder / "good.jsonl"), "--model", str(folder / "model"), "--workers", "1"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["data", "check", str(folder / "bad.jsonl"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "record 1" in out and "absent.mp4" in out


def test_show_writes_a_picture(folder, tmp_path, capsys):
    out = tmp_path / "record.png"
    command = ["data", "show", str(folder / "good.jsonl"), "0", "--model", str(folder / "model"), "--out", str(out)]
    assert main(command) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out


def test_what_a_user_can_mend_is_one_line(folder, capsys):
    assert main(["data", "show", str(folder / "good.jsonl"), "7", "--model", str(folder / "model")]) == 2
    assert "there is no record 7" in capsys.readouterr().err
    assert main(["train", "absent.yaml"]) == 2
    assert "cannot read absent.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["train", "run.yaml", "--resumed"], ["data", "check", "a.jsonl", "b=c"], ["data"], []]
)
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "swim-fast" in capsys.readouterr().err


def test_unknown_flags_are_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["describe", "clip.mp4", "What?", "--model", "m", "--max-framse", "3"])
    assert "unrecognized arguments: --max-framse 3; did you mean '--max-frames'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("data check a --max-frames 1", "--max-frames is 1; it must be at least 2"),
        ("data check a --min-pixels 9 --max-pixels 8", "--min-pixels 9 is above --max-pixels 8"),
        (
            "data check a --reader vlc --fps 0",
            "--reader is 'vlc'; choose one of: decord, torchcodec, pyav; --fps is 0.0",
        ),
        ("data show a 0 --model m --out a.gif", "--out is 'a.gif'; it must end in .html"),
        (
            "describe a.mp4 What? --model m --layers 2",
            "--layers is about the attention of a noun: name one with --show",
        ),
        ("nl-refer build a b --rewriter openai", "--rewriter openai needs a --model"),
        ("evaluate grounding m a --out o --layers 2,x", "--layers is '2,x'; give all, supervised or indices"),
        ("evaluate descriptions m a --out o --judge-only", "--judge-only needs a --judge-model"),
        ("demo --train-clips 0 --heldout-clips -1", "--heldout-clips is -1; it must be positive"),
    ],
)
def test_mistakes_are_spelled_as_on_the_command_line(arguments, message, capsys):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_only_what_a_user_can_mend_loses_its_traceback(monkeypatch, capsys):
    def broken(*_):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("swim_fast.config.load_config", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        main(["train", "run.yaml"])


@pytest.mark.parametrize("words", ["", *JOBS])
def test_help_comes_at_once(words):
    code = (
        "import sys, time; begin = time.process_time(); from swim_fast.cli import main\n"
        f"try: main({words.split()!r} + ['--help'])\n"
        "except SystemExit: pass\n"
        "print(time.process_time() - begin, *{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, last = done.stdout.splitlines()
    (seconds,) = last.split()  # and no module
    assert float(seconds) < 1
    if words:
        options, _ = JOBS[words]
        for name, field in options.model_fields.items():
            assert field.description, f"{words}: {name} has no docstring"
            assert name in options.words or "--" + name.replace("_", "-") in done.stdout


def test_command_lines_give_the_options_of_a_job(monkeypatch):
    seen = []
    for words, (options, _) in JOBS.items():
        monkeypatch.setitem(JOBS, words, (options, lambda given: seen.append(given) or 0))
    main("train run.yaml training.max_steps=3 --dry-run --gpus 2 data.max_frames=4".split())
    main("describe a.mp4 What? --model m --show dog --show cat --layers 1 -2 --fps 2".split())
    main("evaluate descriptions m a --out o --judge-model j --retries 3".split())
    main("data check a --no-decode --workers 0".split())
    train, describe, descriptions, check = seen
    assert train == Train(
        config="run.yaml", overrides=["training.max_steps=3", "data.max_frames=4"], dry_run=True, gpus=2
    )
    assert (describe.show, describe.layers, describe.fps) == (["dog", "cat"], [1, -2], 2.0)
    assert describe.given().keys() == {"media", "question", "model", "show", "layers", "fps"}
    endpoint = descriptions.endpoint(descriptions.judge_model)
    assert endpoint == Endpoint(model="j", retries=3, temperature=0.0)
    assert (check.decode, check.workers, check.max_frames) == (False, 0, 32)


def test_the_version_also_as_a_module():
    done = subprocess.run([sys.executable, "-m", "swim_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"swim-fast {swim_fast.__version__}\n"


def test_help_lists_every_job_once_and_says_what_to_begin_with():
    text = build_parser().format_help()
    assert [words for words in JOBS if text.count(f"\n  {words} ") != 1] == []
    assert text.index("begin:") < text.index("  demo ") < text.index("your data:") < text.index("train:")
    assert "others:" not in text, "SECTIONS of cli.py lacks a job"


@pytest.mark.parametrize("words", JOBS)
def test_every_job_has_an_example_that_parses(words):
    options, _ = JOBS[words]
    args, rest = build_parser().parse_known_args([*words.split(), *shlex.split(options.example.partition(" >>")[0])])
    assert options.example and all("=" in word for word in rest)
    given = {name: value for name, value in vars(args).items() if name in options.model_fields}
    options(**given)  # or OptionError


BASH = """\
source /dev/stdin
COMP_WORDS=({words} "") COMP_CWORD={count} COMPREPLY=()
_swim_fast; echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("swim-fast", {"train", "data", "demo", "--version"}),
        ("swim-fast data", {"check", "import", "show"}),
        ("swim-fast data import", {"davis", "--names"}),
        ("swim-fast train run.yaml --resume", {"--dry-run", "--gpus"}),
        ("swim-fast data data", {"check"}),  # the second is no job
    ],
)
def test_bash_completes_jobs_flags_and_choices(words, offered, capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    code = BASH.format(words=words, count=len(words.split()))
    done = subprocess.run(["bash", "-c", code], input=script, capture_output=True, text=True, check=True)
    assert offered <= set(done.stdout.split()) and not done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_all_jobs(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(f'"{words}' in script for words in JOBS if words.count(" ")) and "max-frames" in script
    path = shutil.which(shell)
    if path:
        subprocess.run([path, "--no-execute"], input=script, text=True, check=True)
