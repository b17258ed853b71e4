"""What is told before torch is imported, a model loaded or an answer generated."""

import json
import subprocess
import sys

import pytest
import yaml

from swim_fast.config import load_config
from swim_fast.errors import OptionError
from swim_fast.preflight import check_model, check_output, check_run, check_template
from tests.training.conftest import environment

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises
from swim_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with a file of records, another with tags, and a run.yaml."""
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "Where is the dog?"}, {"from": "gpt", "value": "Here."}]
    (tmp_path / "plain.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    (tmp_path / "tagged.json").write_text(json.dumps([{"conversations": "the <ins>dog</ins>"}]))
    (tmp_path / "model").mkdir()
    tree = {"model": {"path": "./model"}, "data": {"train": [{"path": "plain.jsonl"}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def tell(*words: str, **variables: str) -> str:
    """The one line that a command without torch prints."""
    env = {key: value for key, value in environment().items() if key != "OPENAI_API_KEY"} | variables
    words = [sys.executable, "-c", WITHOUT_TORCH, *words]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train run.yaml model.path=./absent", "model.path './absent' is no checkpoint .* there is no such folder"),
        ("train run.yaml data.train=[{path: absent.jsonl}]", "data.train.0..path is 'absent.jsonl'.* no such file"),
        ("train run.yaml data.eval.own={path: absent.jsonl}", "data.eval.own.path is 'absent.jsonl'"),
        ("train run.yaml data.train=[{path: plain.jsonl, media: absent}]", "data.train.0..media is 'absent'"),
        ("train run.yaml training.output_dir=plain.jsonl", "training.output_dir is 'plain.jsonl', which cannot be"),
        ("train run.yaml training.max_steps=abc", "training.max_steps is 'abc'; expected int"),
        ("train run.yaml data.train=[{path:", "not valid YAML: line 1, column"),
        ("data check absent.jsonl", "file is 'absent.jsonl'"),
        ("data show plain.jsonl 0 --model ./absent", "--model './absent' is no checkpoint"),
        ("describe plain.jsonl what? --model /absent/model", "--model '/absent/model' is no checkpoint"),
        ("evaluate grounding ./absent plain.jsonl --out out", "model './absent' is no checkpoint"),
        ("evaluate questions ./model absent.jsonl --out out", "file is 'absent.jsonl'"),
        ("evaluate questions ./model plain.jsonl --out plain.jsonl", "--out is 'plain.jsonl', which cannot be made"),
        ("evaluate descriptions ./model plain.jsonl --out out --judge-model m", "OPENAI_API_KEY is not set"),
    ],
)
def test_mistakes_are_told_in_a_line_without_torch(folder, words, message):
    import re

    head, bracket, tail = words.partition("=[") if "=[" in words else words.partition("={")
    *before, last = head.split()
    assert re.search(message, tell(*before, last + bracket + tail))


@pytest.mark.parametrize("job", ["evaluate questions ./{} plain.jsonl --out out", "train run.yaml model.path=./{}"])
def test_a_checkpoint_without_a_chat_template_is_told_without_torch(folder, job):
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    assert "'./model' has no chat template, and questions cannot" in tell(*job.format("model").split())


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_mistake_in_the_chat_template_is_told_without_torch(folder, file):
    template = "{% for message in messages %}\n{{ message.content }"
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    text = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
    (folder / "model" / file).write_text(text)
    told = tell(*"evaluate questions ./model plain.jsonl --out out".split())
    assert f"model/{file}: line 2 is no valid Jinja" in told


def test_tags_of_transformers_in_a_chat_template_are_taken(folder):
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    text = "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(text)
    check_template("./model", "model")


@pytest.mark.parametrize(
    "path", ["./absent", "../absent", "/absent", "~/absent", "a/b/c", "runs/absent", "absent/", "absent"]
)
def test_a_path_that_looks_local_is_not_asked_for(folder, path):
    (folder / "runs").mkdir()
    with pytest.raises(OptionError, match="there is no such folder"):
        check_model(path, "model.path")


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-VL-7B-Instruct", "./model", "model"])
def test_a_name_of_the_hub_or_a_folder_is_taken(folder, path):
    check_model(path, "model.path")


def test_a_metric_of_tags_needs_a_file_with_tags(folder):
    def check(file: str, metric: str) -> None:
        best = ["training.eval_strategy=steps", "training.load_best_model_at_end=true", "training.save_strategy=steps"]
        sets = [f"data.eval.own.path={file}", f"training.metric_for_best_model={metric}"]
        check_run(load_config("run.yaml", ["attention_loss=null", *best, *sets]))

    check("tagged.json", "eval_own_soft_iou")
    check("plain.jsonl", "own_loss")
    for metric in ("eval_own_soft_iou", "own_mask_loss"):
        with pytest.raises(OptionError, match="plain.jsonl has no tagged noun .* choose own_loss"):
            check("plain.jsonl", metric)


def test_a_folder_for_results_is_made(folder):
    check_output("new/out", "--out")
    assert (folder / "new" / "out").is_dir()
