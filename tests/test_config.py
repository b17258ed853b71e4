import json

import pytest
import yaml

from swim_fast.config import AttentionLossConfig, ConfigError, DataConfig, ModelConfig, RunConfig, load_config

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
    assert (loss.fusion, loss.criterion, loss.resolution) == ("product", "bce", "mask")
    assert load_config(write()).model.freeze == ["vision_tower"]


def test_overrides_replace_values_and_make_sections(write):
    config = load_config(write(), ["attention_loss.criterion=kl", "training.max_steps=7", "data.max_frames=8"])
    assert (config.attention_loss.criterion, config.training["max_steps"], config.data.max_frames) == ("kl", 7, 8)


def test_yaml_1_1_does_not_turn_numbers_into_text_nor_no_into_false(write):
    arguments = load_config(write(), ["training.learning_rate=2e-5", "training.max_steps=3"]).training_arguments()
    assert arguments.learning_rate == 2e-5
    assert load_config(write(), ["training.save_strategy=no"]).training_arguments().save_strategy == "no"
    assert load_config(write(), ["attention_loss.text_weight=5e-2"]).attention_loss.text_weight == 0.05


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention_loss.critereon=kl", "unknown key 'attention_loss.critereon'; did you mean 'criterion'"),
        ("modle.path=x", "unknown key 'modle'; did you mean 'model'"),
        ("attention_loss.criterion=mse", "attention_loss.criterion is 'mse'; choose one of: bce, iou, dice, kl"),
        ("data.max_frames=many", "data.max_frames is 'many'; expected int"),
        ("data.max_frames=true", "data.max_frames is True; expected int"),
        ("data.max_frames=1", "two frames make one temporal patch"),
        ("data={min_pixels: 200, max_pixels: 100}", "min_pixels 200 is above max_pixels 100"),
        ("data.fps=0", "fps is 0.0; it must be positive"),
        ("data={min_pixels: 200, total_pixels: 300}", "total_pixels 300 is below two frames of min_pixels 200"),
        (
            "optimization.learning_rates={visual_tower: 1}",
            "'optimization.learning_rates.visual_tower'; did you mean 'vision_",
        ),
        (
            "optimization.learning_rates={merger: -1}",
            "learning_rates.merger is -1.0; it must be a number of at least 0",
        ),
        (
            "optimization.learning_rates={vision_tower: 1}",
            "learning_rates names vision_tower, which model.freeze keeps",
        ),
        ("optimization.early_stopping_patience=0", "early_stopping_patience is 0; it must be at least 1"),
        ("data.train=[{path: a.jsonl, weight: 0}]", "weight of a.jsonl is 0"),
        ("data.train=[{pth: a.jsonl}]", "unknown key 'data.train[0].pth'; did you mean 'path'"),
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
        ("learning_rat", "unknown key 'training.learning_rat'; did you mean 'learning_rate'"),
        ("remove_unused_columns", "training.remove_unused_columns must be False"),
    ],
)
def test_training_arguments_are_checked_by_name(write, key, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(training={key: True})).training_arguments()
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
    config = load_config(write(**sections, training=training))
    with pytest.raises(ConfigError) as error:
        config.training_arguments()
    assert message in str(error.value)
    good = load_config(write(**sections, training=BEST)).training_arguments()
    assert good.greater_is_better and good.restore_callback_states_from_checkpoint


def test_the_best_checkpoint_needs_an_evaluation(write):
    with pytest.raises(ConfigError, match="data.eval names no file"):
        load_config(write(training=BEST)).training_arguments()


def test_learning_rates_and_an_optimizer_of_deepspeed_exclude_each_other(write, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"optimizer": {"type": "Adam"}, "train_micro_batch_size_per_gpu": "auto"}))
    config = load_config(write(training={"deepspeed": str(path)}, optimization={"learning_rates": {"merger": 1}}))
    with pytest.raises(ConfigError, match="remove its section 'optimizer'"):
        config.training_arguments()


def test_checkpointing_is_not_reentrant_unless_asked_for(write):
    def keywords(**training):
        return load_config(write(training=training)).training_arguments().gradient_checkpointing_kwargs

    assert keywords(gradient_checkpointing=True) == {"use_reentrant": False}
    for given in ({"every_n_layers": 2}, {"use_reentrant": True}):
        found = keywords(gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
        assert found == {"use_reentrant": False} | given


def test_missing_key_file_and_broken_yaml(write, tmp_path):
    path = write(model={})
    with pytest.raises(ConfigError, match="missing key 'model.path'"):
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


@pytest.mark.parametrize(("numerics", "read_out"), [("stable", "supervised"), ("paper", "all")])
def test_maps_are_read_out_where_the_numerics_need_them(numerics, read_out):
    loss = AttentionLossConfig(numerics=numerics)
    assert RunConfig(ModelConfig("m"), DataConfig(), loss).sample_options().read_out == read_out


def test_every_option_of_samples_that_data_names_reaches_them(write):
    config = load_config(
        write(), ["data={fps: 2, max_frames: 64, min_pixels: 100, max_pixels: 200, total_pixels: 900}"]
    )
    options = config.sample_options()
    found = (options.fps, options.max_frames, options.min_pixels, options.max_pixels, options.total_pixels)
    assert found == (2.0, 64, 100, 200, 900)


def test_what_deepspeed_cannot_do_is_told_before_the_model_is_loaded(write, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    lora = {"path": "m", "lora": {"quantize": "nf4"}}
    with pytest.raises(ConfigError, match="model.lora.quantize nf4 .* take ZeRO-2"):
        load_config(write(model=lora, training={"deepspeed": str(path)})).training_arguments()
    with pytest.raises(ConfigError, match="training.deepspeed: cannot read .*absent.json"):
        load_config(write(training={"deepspeed": str(tmp_path / "absent.json")})).training_arguments()
