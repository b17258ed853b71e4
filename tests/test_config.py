import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from swim_fast.config import ConfigError, DataConfig, ModelConfig, RunConfig, load_config
from swim_fast.config_page import draw_page
from swim_fast.options import AttentionLoss
from swim_fast.training.arguments import build_arguments
from swim_fast.training_fields import FIXED, HONOURED, NEWER, NO_EFFECT, OWN, training_fields

MINIMAL = {"model": {"path": "some/model"}, "data": {"train": [{"path": "train.jsonl"}]}}


@pytest.fixture
def write(tmp_path):
    def write(**sections):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | sections))
        return path

    return write


def test_defaults_are_the_papers(write):
    loss = load_config(write()).attention_loss
    assert (loss.text_weight, loss.mask_weight) == (0.05, 1.0)
    assert (loss.fusion, loss.criterion, loss.resolution) == ("mean", "bce", "mask")
    assert (loss.softmax, loss.prediction, loss.query_position) == ("frame", "probability", "noun")
    assert load_config(write()).model.freeze == ["vision_tower"]


def test_overrides_replace_values_and_make_sections(write):
    config = load_config(write(), ["attention_loss.criterion=kl", "training.max_steps=7", "data.max_frames=8"])
    assert (config.attention_loss.criterion, config.training["max_steps"], config.data.max_frames) == ("kl", 7, 8)


def test_yaml_1_1_does_not_turn_numbers_into_text_nor_no_into_false(write):
    arguments = build_arguments(load_config(write(), ["training.learning_rate=2e-5", "training.max_steps=3"]))
    assert arguments.learning_rate == 2e-5
    assert build_arguments(load_config(write(), ["training.save_strategy=no"])).save_strategy == "no"
    assert load_config(write(), ["attention_loss.text_weight=5e-2"]).attention_loss.text_weight == 0.05


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention_loss.critereon=kl", "attention_loss.critereon is unknown; did you mean 'criterion'"),
        ("modle.path=x", "modle is unknown; did you mean 'model'"),
        ("attention_loss.criterion=mse", "attention_loss.criterion is 'mse'; choose one of: bce, focal, iou"),
        ("data.max_frames=many", "data.max_frames is 'many'; expected int"),
        ("data.max_frames=true", "data.max_frames is True; expected int"),
        ("data.fps=true", "data.fps is True; expected a number"),
        ("data.fps=.inf", "data.fps is inf; expected a finite number"),
        ("model.liger=1", "model.liger is 1; expected true or false"),
        ("training.max_steps=true", "training.max_steps is True; expected int"),
        ("training.learning_rate=fast", "training.learning_rate is 'fast'; expected float"),
        ("data.max_frames=1", "data.max_frames is 1; it must be at least 2"),
        ("data={min_pixels: 200, max_pixels: 100}", "data.min_pixels 200 is above data.max_pixels 100"),
        ("data.fps=0", "data.fps is 0; it must be positive"),
        (
            "data={min_pixels: 200, total_pixels: 300}",
            "data.total_pixels 300 is below two frames of data.min_pixels 200",
        ),
        (
            "optimization.learning_rates={visual_tower: 1}",
            "optimization.learning_rates.visual_tower is unknown; did you mean 'vision_",
        ),
        (
            "optimization.learning_rates={merger: -1}",
            "learning_rates.merger is -1; it must be at least 0",
        ),
        (
            "optimization.learning_rates={vision_tower: 1}",
            "learning_rates.vision_tower is of a part that model.freeze keeps",
        ),
        ("optimization.early_stopping_patience=0", "early_stopping_patience is 0; it must be positive"),
        ("data.train=[{path: a.jsonl, weight: 0}]", "data.train[0].weight is 0; it must be positive"),
        ("data.train=[{pth: a.jsonl}]", "data.train[0].pth is unknown; did you mean 'path'"),
        ("model.lora={rank: 0}", "model.lora.rank is 0"),
        ("model.lora={dropout: 1.0}", "model.lora.dropout is 1"),
        ("model.lora={targets: []}", "model.lora.targets is empty"),
        ("attention_loss.layers=[]", "attention_loss.layers is empty"),
        ("attention_loss.layers=[1, x]", r"attention_loss.layers[1] is 'x'; expected int"),
        ("attention_loss", "not of the form key.sub=value"),
        ("model.path.sub=1", "path is a single value"),
        ("model=[]", "model must be a mapping"),
    ],
)
def test_mistakes_are_named_with_their_remedy(write, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(), [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("learning_rat", "training.learning_rat is unknown; did you mean 'learning_rate'"),
        ("remove_unused_columns", "training.remove_unused_columns must be False"),
    ],
)
def test_build_arguments_are_checked_by_name(write, key, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(training={key: True}))
    assert message in str(error.value)


BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "heldout_pointing_accuracy",
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 5,
    "save_steps": 5,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict.fromkeys(BEST),
            "needs training.load_best_model_at_end, training.metric_for_best_model, training.eval_str",
        ),
        ({"load_best_model_at_end": False}, "early_stopping_patience needs training.load_best_model_at_end"),
        ({"metric_for_best_model": "eval_heldout_pointing"}, "did you mean 'eval_heldout_pointing_accuracy'"),
        ({"metric_for_best_model": "eval_loss"}, "is 'eval_loss', which no evaluation gives"),
        ({"save_steps": 7}, "a round multiple"),
    ],
)
def test_early_stopping_says_what_it_needs(write, changed, message):
    eval_ = {"eval": {"heldout": {"path": "heldout.jsonl"}}}
    training = {key: value for key, value in (BEST | changed).items() if value is not None}
    sections = {"data": MINIMAL["data"] | eval_, "optimization": {"early_stopping_patience": 3}}
    with pytest.raises(ConfigError) as error:
        build_arguments(load_config(write(**sections, training=training)))
    assert message in str(error.value)
    good = build_arguments(load_config(write(**sections, training=BEST)))
    assert good.greater_is_better and good.restore_callback_states_from_checkpoint


def test_the_best_checkpoint_needs_an_evaluation(write):
    with pytest.raises(ConfigError, match="data.eval names no file"):
        load_config(write(training=BEST))


def test_learning_rates_and_an_optimizer_of_deepspeed_exclude_each_other(write, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"optimizer": {"type": "Adam"}, "train_micro_batch_size_per_gpu": "auto"}))
    with pytest.raises(ConfigError, match="remove its section 'optimizer'"):
        load_config(write(training={"deepspeed": str(path)}, optimization={"learning_rates": {"merger": 1}}))


def test_checkpointing_is_not_reentrant_unless_asked_for(write):
    def keywords(**training):
        return build_arguments(load_config(write(training=training))).gradient_checkpointing_kwargs

    assert keywords(gradient_checkpointing=True) == {"use_reentrant": False}
    for given in ({"every_n_layers": 2}, {"use_reentrant": True}):
        found = keywords(gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
        assert found == {"use_reentrant": False} | given


def test_missing_key_file_and_broken_yaml(write, tmp_path):
    path = write(model={})
    with pytest.raises(ConfigError, match="missing model.path"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_effective_configuration_reads_back(write, tmp_path):
    config = load_config(write(), ["attention_loss.layers=[2, 7]"])
    (tmp_path / "again.yaml").write_text(config.as_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(("prediction", "read_out"), [("min_max", "supervised"), ("released", "all")])
def test_maps_are_read_out_where_the_prediction_needs_them(prediction, read_out):
    loss = AttentionLoss(prediction=prediction, softmax="causal")
    config = RunConfig(model=ModelConfig(path="m"), data=DataConfig(), attention_loss=loss)
    assert config.supervision.read_out == read_out


def test_what_the_released_prediction_needs_and_what_numerics_are_called_now(write):
    with pytest.raises(ConfigError, match="attention_loss.prediction released normalises over the whole video, which "):
        load_config(write(attention_loss={"prediction": "released"}))
    with pytest.raises(ConfigError, match="numerics is gone: write `prediction: min_max` for stable, `prediction: rel"):
        load_config(write(attention_loss={"numerics": "paper"}))


def test_every_option_of_samples_that_data_names_reaches_them(write):
    config = load_config(
        write(), ["data={fps: 2, max_frames: 64, min_pixels: 100, max_pixels: 200, total_pixels: 900}"]
    )
    options = config.sampling
    found = (options.fps, options.max_frames, options.min_pixels, options.max_pixels, options.total_pixels)
    assert found == (2.0, 64, 100, 200, 900)


def test_options_of_a_source_that_contradict_others(write):
    train = (
        "data={max_pixels: 200, train: [{path: a}, {path: b, min_pixels: 300}], eval: {x: {path: c, min_pixels: 201}}}"
    )
    with pytest.raises(ConfigError) as error:
        load_config(write(), [train])
    for key in ("data.train[1] contradicts the limits of all files: min_pixels 300", "data.eval.x contradicts"):
        assert key in str(error.value)
    assert "min_pixels 201 is above max_pixels 200; change one of them" in str(error.value)
    config = load_config(write(), ["data={max_pixels: 200, train: [{path: b, min_pixels: 300, max_pixels: 400}]}"])
    assert config.data.train[0].own_sampling == {"min_pixels": 300, "max_pixels": 400}


def test_an_attention_loss_needs_tags(write):
    no_tags = {"train": [{"path": "a", "use_tags": False}, {"path": "b", "use_tags": False}]}
    with pytest.raises(ConfigError, match="attention_loss needs tagged nouns, but use_tags is false in every file of"):
        load_config(write(data=no_tags))
    assert load_config(write(data=no_tags, attention_loss=None)).attention_loss is None
    assert load_config(write(data=no_tags, attention_loss={"mask_weight": 0})).attention_loss
    no_tags["train"][0]["use_tags"] = True
    assert load_config(write(data=no_tags)).attention_loss


def test_a_file_without_tags_gives_no_metric_of_maps(write):
    eval_ = {"heldout": {"path": "heldout.jsonl", "use_tags": False}}
    with pytest.raises(ConfigError, match="'heldout_pointing_accuracy', which no evaluation gives"):
        load_config(write(data=MINIMAL["data"] | {"eval": eval_}, training=BEST))
    best = BEST | {"metric_for_best_model": "eval_heldout_text_loss"}
    load_config(write(data=MINIMAL["data"] | {"eval": eval_}, training=best))


@pytest.mark.parametrize("attention_loss", [{"supervise": "second", "softmax": "full"}, None])
def test_labels_and_masks_reach_the_samples(write, attention_loss):
    config = load_config(write(attention_loss=attention_loss), ["data.label_header=true"])
    assert config.supervision.label_header
    assert config.supervision.supervise == ("second" if attention_loss else "either")
    assert not load_config(write()).supervision.label_header


def test_system_prompt_is_text(write):
    for prompt in ("Look: closely.", "", None):
        config = load_config(write(data=MINIMAL["data"] | {"system_prompt": prompt}))
        assert config.sampling.system_prompt == prompt
    with pytest.raises(ConfigError, match="data.system_prompt is 3; expected text"):
        load_config(write(), ["data.system_prompt=3"])


def test_what_deepspeed_cannot_do_is_told_before_the_model_is_loaded(write, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    lora = {"path": "m", "lora": {"quantize": "nf4"}}
    with pytest.raises(ConfigError, match="model.lora.quantize nf4 .* take ZeRO-2"):
        load_config(write(model=lora, training={"deepspeed": str(path)}))
    with pytest.raises(ConfigError, match="training.deepspeed is .*absent.json', which cannot be read"):
        load_config(write(training={"deepspeed": str(tmp_path / "absent.json")}))


BAD = """
model: {pth: x, lora: {rank: 0, dropout: 1.0}}
data: {max_frame: 3, min_pixels: 200, max_pixels: 100, fps: 2e0, train: [{path: a.jsonl, weight: 0}], max_tokens: true}
attention_loss: {fusion: meen, text_weight: 5e-2}
optimization: {learning_rates: {visual_tower: 1, vision_tower: 1}}
training: {learning_rat: 1, max_steps: many, load_best_model_at_end: true}
datta: {}
"""


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    head, *mistakes = str(error.value).splitlines()
    assert head == f"{path}: 15 mistakes"
    assert [mistake.split()[0] for mistake in mistakes if "missing" not in mistake] == [
        "datta",
        "model.pth",
        "data.max_frame",
        "attention_loss.fusion",
        "optimization.learning_rates.visual_tower",
        "model.lora.rank",
        "model.lora.dropout",
        "data.max_tokens",
        "data.train[0].weight",
        "data.min_pixels",  # and what is found when the values are sound
        "optimization.learning_rates.vision_tower",
        "training.learning_rat",
        "training.max_steps",
        "training.load_best_model_at_end",
    ]


def test_mistakes_are_told_without_torch_in_under_a_second(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    code = (
        "import sys, time; begin = time.process_time(); from swim_fast.cli import main\n"
        f"assert main(['train', {str(path)!r}]) == 2\n"
        "print(time.process_time() - begin, *{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "15 mistakes" in done.stderr and "did you mean 'learning_rate'?" in done.stderr
    (seconds,) = done.stdout.split()  # and no module
    assert float(seconds) < 1


def test_training_fields_are_those_of_transformers():
    assert training_fields().keys() - OWN == {
        field.name for field in dataclasses.fields(TrainingArguments) if field.init
    }


def test_every_training_field_is_honoured_or_refused_by_name(write):
    known, installed = [*FIXED, *NO_EFFECT, *HONOURED], training_fields().keys() - OWN
    assert sorted(name for name in known if name not in NEWER - installed) == sorted(installed)  # each is in one list
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    others = {bool: lambda value: not value, float: lambda value: value + 0.1, int: lambda value: value + 1}
    for name, (default, remedy) in NO_EFFECT.items():
        if name not in installed:
            continue
        if name != "include_for_metrics":  # made by a factory
            assert default == defaults[name], name
        load_config(write(training={name: default}))
        other = others.get(type(default), lambda value: "something else")(default)
        with pytest.raises(ConfigError, match=f"training.{name} has no effect here") as error:
            load_config(write(training={name: other}))
        assert remedy in str(error.value)


def test_a_run_is_not_changed_by_what_it_resolves(write):
    config = load_config(write())
    for name in ("model", "data"):
        with pytest.raises(ValueError, match="frozen"):
            setattr(config, name, None)
    assert config.replace(training={"max_steps": 1}).training == {"max_steps": 1} and config.training == {}


def test_no_maps_at_all(write):
    config = load_config(write(attention_loss=None))
    assert config.attention_loss is None and config.supervision.read_out == "supervised"
    with pytest.raises(ConfigError, match="attention_loss.layers is empty: .* write `attention_loss: null`"):
        load_config(write(attention_loss={"layers": [], "mask_weight": 0}))


def test_the_page_of_all_keys_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == draw_page(), "python -m swim_fast.config_page > docs/configuration.md"
    for options in (ModelConfig, DataConfig, AttentionLoss):
        for name, field in options.model_fields.items():
            assert field.description.endswith((".", "…")), f"{options.__name__}.{name} has no docstring"
