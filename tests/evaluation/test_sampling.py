"""Evaluations take frames as the run that made the checkpoint did, where no option says otherwise."""

import shutil

import pytest

from swim_fast.cli import main
from swim_fast.config import DataConfig, ModelConfig, RunConfig, load_config
from swim_fast.errors import OptionError
from swim_fast.evaluation.run import Ranks, Run
from swim_fast.inference.loading import as_run, load_processor
from swim_fast.jobs import Check, Grounding, Questions, Show
from swim_fast.options import AttentionLoss
from swim_fast.position_ids import compute_rope_index
from tests.evaluation.conftest import arguments, lines, results


@pytest.fixture
def trained(checkpoint, tmp_path):
    """A copy of the checkpoint as `swim-fast train` leaves it."""
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    data = DataConfig(max_frames=2, fps=1.5, max_pixels=2048, reader="pyav", decode_timeout=7.0)
    loss = AttentionLoss(layers=[0], fusion="mean", query_position="predictor")
    config = RunConfig(model=ModelConfig(path="start"), data=data, attention_loss=loss)
    (folder / "config.yaml").write_text(config.as_yaml())
    return folder


def run(model, file, out, **options):
    return Run(Questions(model=model, file=file, out=out, **options), Ranks(0, 1, "cpu"))


def test_what_is_not_given_is_that_of_training(trained, annotated, tmp_path):
    as_trained = run(trained, annotated, tmp_path)
    sampling, decoding = as_trained.sampling, as_trained.decoding
    assert (sampling.max_frames, sampling.fps, sampling.max_pixels) == (2, 1.5, 2048)
    assert (decoding.reader, decoding.decode_timeout) == ("pyav", 7.0)
    builder = as_trained.sample_builder(load_processor(trained))
    assert len(builder(as_trained.records[0]).frames) == 2
    given = run(trained, annotated, tmp_path, max_frames=4, reader="decord")
    assert (given.sampling.max_frames, given.decoding.reader, given.sampling.fps) == (4, "decord", 1.5)
    # An option wins even where it has the default's value.
    assert run(trained, annotated, tmp_path, max_frames=32).sampling.max_frames == 32


def test_a_named_run_is_followed_where_the_model_has_none(trained, checkpoint, annotated, tmp_path):
    file = str(trained / "config.yaml")
    assert run(checkpoint, annotated, tmp_path).sampling.max_frames == 32
    sampling = run(checkpoint, annotated, tmp_path, config=file).sampling
    assert (sampling.max_frames, sampling.fps, sampling.max_pixels) == (2, 1.5, 2048)
    for job in (Check(file=annotated, config=file), Show(file=annotated, index=0, model=checkpoint, config=file)):
        made = as_run(job)
        assert (made.max_frames, made.fps, made.reader) == (2, 1.5, "pyav")
    assert made.query_position == "predictor"  # of Show
    assert as_run(Check(file=annotated, model=trained, fps=3.0)).given()["fps"] == 3.0
    assert as_run(Check(file=annotated, model=trained)).max_frames == 2
    assert as_run(Check(file=annotated)).max_frames == 32
    with pytest.raises(OptionError, match="cannot read"):
        as_run(Check(file=annotated, config="absent.yaml"))


def test_a_file_of_the_run_has_the_pixel_limits_that_it_has_there(trained, annotated, tmp_path, monkeypatch):
    file = trained / "config.yaml"
    own = f"{{path: {annotated}, max_pixels: 1568}}"
    file.write_text(load_config(file, [f"data.train=[{own}]", f"data.eval={{same: {own}}}"]).as_yaml())
    monkeypatch.chdir(annotated.parent)
    assert run(trained, annotated.name, tmp_path).sampling.max_pixels == 1568
    assert run(trained, annotated, tmp_path, max_pixels=3136).sampling.max_pixels == 3136
    checked = as_run(Check(file=annotated, config=file))
    assert (checked.max_pixels, checked.softmax, checked.query_position) == (1568, "frame", "predictor")
    other = tmp_path / "other.jsonl"
    shutil.copy(annotated, other)
    assert as_run(Check(file=other, config=file)).max_pixels == 2048
    file.write_text(load_config(file, [f"data.eval={{same: {{path: {annotated}}}}}"]).as_yaml())
    with pytest.raises(OptionError, match="several sources of the run, of different limits"):
        as_run(Check(file=annotated, config=file))


def test_text_and_seconds_are_those_of_training(trained, checkpoint, annotated, tmp_path):
    file = trained / "config.yaml"
    file.write_text(load_config(file, ["data.system_prompt=Look.", "data.seconds_per_patch=one"]).as_yaml())

    def text(model, **options):
        made = run(model, annotated, tmp_path, **options)
        processor = load_processor(trained)
        inputs = made.sample_builder(processor)(made.records[0]).inputs
        settings = made.settings("questions")
        assert settings["system_prompt"] == made.sampling.system_prompt
        return processor.tokenizer.decode(inputs["input_ids"]), inputs["second_per_grid_ts"].item()

    found, seconds = text(trained, max_frames=6)
    assert found.startswith("<|im_start|>system\nLook.<|im_end|>\n") and seconds == 1.0
    found, seconds = text(trained, max_frames=6, system_prompt="", seconds_per_patch="measured")
    assert found.startswith("<|im_start|>user\n") and seconds == pytest.approx(5 / 6)  # at 1.5 frames per second
    found, seconds = text(checkpoint, max_frames=6)
    assert found.startswith("<|im_start|>system\nYou are a helpful") and seconds == 0.5


@pytest.mark.parametrize("rule", ["pretraining", "library"])
def test_position_ids_are_those_of_training(trained, checkpoint, annotated, tmp_path, rule):
    file = trained / "config.yaml"
    config = load_config(file, [f"model.position_ids={rule}"])
    file.write_text(config.as_yaml())
    as_trained = run(trained, annotated, tmp_path)
    assert as_trained.settings("questions")["position_ids"] == rule
    assert follows_pretraining(as_trained.load().model) == (rule == "pretraining")
    other = "library" if rule == "pretraining" else "pretraining"
    given = run(trained, annotated, tmp_path, position_ids=other)
    assert given.settings("questions")["position_ids"] == other
    assert follows_pretraining(given.load().model) == (other == "pretraining")
    assert run(checkpoint, annotated, tmp_path).inference.position_ids == "pretraining"


def follows_pretraining(model):
    return getattr(model.model.get_rope_index, "__func__", None) is compute_rope_index


def test_it_is_recorded_and_said(trained, checkpoint, questions, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    short = ["--limit", "2", "--max-new-tokens", "2", "--batch-size", "2", "--workers", "0"]
    words = ["evaluate", "questions", str(trained), str(questions), *short]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    settings = results(tmp_path / "out")["settings"]
    expected = {"max_frames": 2, "fps": 1.5, "max_pixels": 2048, "reader": "pyav"}
    assert {name: settings[name] for name in expected} == expected
    assert lines(tmp_path / "out" / "predictions-rank0.jsonl")[0]["settings"] == settings
    assert f"options that are not given are those of training ({trained / 'config.yaml'})" in caplog.text
    assert "sampling: max_frames 2, fps 1.5, max_pixels 2048, seconds_per_patch measured, reader pyav" in caplog.text
    assert "up to 2 frames" in capsys.readouterr().out
    # Another number of frames is another run.
    assert main([*words, "--out", str(tmp_path / "out"), "--max-frames", "4", "--limit", "3"]) == 2
    assert "max_frames was 2 and is 4" in capsys.readouterr().err
    # Without a configuration beside it, the defaults.
    options = Questions(model=checkpoint, file=questions, out=tmp_path)
    assert Run(options, Ranks(0, 1, "cpu")).settings("questions")["max_frames"] == 32


def test_grounding_looks_where_training_did(trained, annotated, tmp_path):
    out, few = tmp_path / "out", ["--limit", 2, "--max-pixels", 64 * 96]
    assert main(arguments("grounding", trained, annotated, out, *few)) == 0
    found = results(out)
    assert found["fused_layers"] == [0] and found["settings"]["max_frames"] == 4
    rows = {"fusion": "mean", "query_position": "predictor", "softmax": "frame", "supervise": "either"}
    assert {name: found["settings"][name] for name in rows} == rows
    second = tmp_path / "second"
    file = trained / "config.yaml"
    file.write_text(load_config(file, ["attention_loss.supervise=second"]).as_yaml())
    assert main(arguments("grounding", trained, annotated, second, *few)) == 0
    assert results(second)["settings"]["supervise"] == "second"
    other = tmp_path / "other"
    assert main(arguments("grounding", trained, annotated, other, *few, "--query-position", "noun")) == 0
    assert results(other)["settings"]["query_position"] == "noun" and results(other)["fused"] != found["fused"]
    assert Grounding(model=trained, file=annotated, out=out).layers == "all"
