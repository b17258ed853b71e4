"""Grounding from the command line, against the metrics of one record at a time."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from swim_fast import attach_noun_attention
from swim_fast.cli import main
from swim_fast.data.batch.collation import Collator
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.records import RecordFile
from swim_fast.evaluation.grounding import supervised_layers
from swim_fast.inference.loading import trained_as
from swim_fast.loss.mask_loss import GridPredictions
from swim_fast.loss.metrics import METRICS, average_metrics, sum_metrics
from swim_fast.loss.ranking_metrics import sum_ranking_metrics
from swim_fast.options import RANKING_METRICS, Sampling
from tests.evaluation.conftest import CLIPS, arguments, lines, results


def sums_one_by_one(folder, path, fused):
    """By layer [2, 4] and of the fused layers [4], over all records; and the same of the ranking metrics."""
    model = attach_noun_attention(AutoModelForImageTextToText.from_pretrained(folder).eval(), [0, 1])
    processor = AutoProcessor.from_pretrained(folder)
    builder, collate, records = (
        SampleBuilder(processor, Sampling(max_frames=4)),
        Collator(processor),
        RecordFile(path),
    )
    by_layer, together, ranked, ranked_together = 0, 0, 0, 0
    for number in range(CLIPS):
        batch = collate([builder(records[number])])
        if "second_per_grid_ts" in batch:  # cut as by the rule of pretraining
            batch["second_per_grid_ts"] = [int(seconds) for seconds in batch["second_per_grid_ts"]]
        about = ("labels", "mask_targets", "samples", "problems", "notes")
        with torch.no_grad():
            maps = model(**{key: value for key, value in batch.items() if key not in about}).attentions
        each = GridPredictions.from_maps(maps, batch["mask_targets"], fusion="none")
        by_layer, ranked = by_layer + sum_metrics(each), ranked + sum_ranking_metrics(each)
        one = GridPredictions.from_maps([maps[layer] for layer in fused], batch["mask_targets"])
        together, ranked_together = together + sum_metrics(one), ranked_together + sum_ranking_metrics(one)
    return by_layer, together, ranked, ranked_together


@pytest.mark.parametrize("layers, fused", [("all", [1]), ("0,-1", [0, 1])])
def test_layers_and_fused(checkpoint, annotated, tmp_path, capsys, layers, fused):
    assert supervised_layers(trained_as(checkpoint), 2, range(2)) == [1]
    assert main(arguments("grounding", checkpoint, annotated, tmp_path, f"--layers={layers}", "--batch-size", 3)) == 0
    by_layer, together, ranked, ranked_together = sums_one_by_one(checkpoint, annotated, fused)
    found = results(tmp_path)
    assert found["pairs"] == together[3] and found["records"] == CLIPS and found["without"] == 1
    assert list(found["problems"]) == ["5"] and "broken.mp4" in found["problems"]["5"]
    assert found["fused_layers"] == fused and list(found["layers"]) == ["0", "1"]
    for layer in (0, 1):
        expected = average_metrics(by_layer[layer])
        assert found["layers"][str(layer)] == pytest.approx(expected, rel=1e-4)
    assert found["fused"] == pytest.approx(average_metrics(together), rel=1e-4)
    assert found["fused"] != found["layers"]["0"]
    ranking = found["ranking"]
    assert ranking["pairs"] == ranked_together[-1] <= found["pairs"] and list(ranking["layers"]) == list(
        map(str, fused)
    )
    for layer in fused:
        expected = average_metrics(ranked[layer], RANKING_METRICS)
        assert ranking["layers"][str(layer)] == pytest.approx(expected, rel=1e-4)
    assert ranking["fused"] == pytest.approx(average_metrics(ranked_together, RANKING_METRICS), rel=1e-4)
    printed = capsys.readouterr().out
    values = [f"{found['layers']['1'][name]:.3f}" for name in METRICS]
    assert (
        " | ".join(["| 1 *  ", *(value.rjust(len(name)) for value, name in zip(values, METRICS, strict=True))])
        in printed
    )
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert "without a tagged noun with a mask: 1 record\n" in printed
    second = printed[printed.index("| layer", printed.index("## Pixels")) :]
    assert " | ".join(RANKING_METRICS.values()) in " ".join(second.splitlines()[0].split())
    assert f"{ranking['fused']['auc']:.3f}" in second and "SWIM-7B (published)" in second
    assert f"{ranking['pairs']} pairs whose mask is neither empty nor full" in second


def test_a_second_run_looks_at_the_rest(checkpoint, annotated, tmp_path, capsys):
    words = arguments("grounding", checkpoint, annotated, tmp_path, "--layers", "supervised")
    assert main([*words, "--limit", "3"]) == 0
    assert list(results(tmp_path)["layers"]) == ["1"]
    assert main(words) == 0
    kept = [entry["record"] for entry in lines(tmp_path / "predictions-rank0.jsonl")[1:]]
    assert kept[:3] == [0, 1, 2] and sorted(kept[3:]) == [3, 4, 5]
    whole = tmp_path / "whole"
    assert main(arguments("grounding", checkpoint, annotated, whole, "--layers", "supervised")) == 0
    assert results(whole)["fused"] == pytest.approx(results(tmp_path)["fused"], rel=1e-5)
    assert main([*words[:-1], "some"]) == 2
    assert "--layers is 'some'" in capsys.readouterr().err
    assert main(arguments("grounding", checkpoint, annotated, tmp_path / "other", "--layers", "7")) == 2
    assert "layer 7 is out of range" in capsys.readouterr().err


def test_layers_of_the_training_configuration(tmp_path):
    assert supervised_layers(trained_as("Qwen/Qwen2.5-VL-7B-Instruct"), 28, range(28)) == [2, 7, 12, 17, 22, 27]
    whole = "model: {path: start}\ndata: {train: []}\n"
    (tmp_path / "config.yaml").write_text(f"{whole}attention_loss:\n  layers: [3, -1]\n")
    assert supervised_layers(trained_as(tmp_path), 28, range(28)) == [3, 27]
    (tmp_path / "config.yaml").write_text(f"{whole}attention_loss: {{layers: null}}\n")
    assert supervised_layers(trained_as(tmp_path), 28, range(28)) == [2, 7, 12, 17, 22, 27]
