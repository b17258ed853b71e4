"""`swim-fast analyze` against attention matrices computed in full, in float64."""

import csv
import sys

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from swim_fast.cli import main
from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.records import RecordFile
from swim_fast.inference.loading import load_model
from swim_fast.options import Inference, Sampling, Supervision
from tests.evaluation.conftest import lines, results
from tests.training.conftest import record, run, square_clip, text_record, write_records

pytest.importorskip("HanTa")
QUESTIONS = {
    "<video>\nWhat does the small white <ins>square</ins> on the left do?": "faaNffa",
    "<video>\nIs the <ins>ball</ins> big or is it small?": "fN",
    "<video>\nWhat does a black <ins>rectangle</ins> with a red hat do?": "faNffan",
}
KINDS = {"N": "noun", "a": "attribute", "n": "other noun", "f": "function word"}
WORDS = [
    "What does <ins>the</ins> <ins>small</ins> <ins>white</ins> <ins>square</ins> <ins>on</ins> <ins>the</ins> "
    "<ins>left</ins> do?",
    "Is <ins>the</ins> <ins>ball</ins> big or is it small?",
    "What does <ins>a</ins> <ins>black</ins> <ins>rectangle</ins> <ins>with</ins> <ins>a</ins> <ins>red</ins> "
    "<ins>hat</ins> do?",
]
METRICS = ("entropy", "mass_in_mask", "pointing_accuracy", "gamepoint", "soft_iou", "visual_share")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The set, and the same with every word of its expressions tagged by hand."""
    folder = tmp_path_factory.mktemp("words")
    plain, by_hand = [], []
    for number, (question, classes) in enumerate(QUESTIONS.items()):
        clip = record(f"{number}.mp4", square_clip(folder / f"{number}.mp4", number)[: 3 + number])
        clip["conversations"][0]["value"] = question
        plain.append(clip)
        turns = [{"from": "human", "value": f"<video>\n{WORDS[number]}"}, clip["conversations"][1]]
        by_hand.append({**clip, "conversations": turns, "annotation": clip["annotation"] * len(classes)})
    foreign = {**plain[0], "conversations": [{"from": "human", "value": "Der <ins>Hund</ins>"}, turns[1]]}
    plain += [text_record(0), foreign, {**plain[0], "video": "absent.mp4"}]
    return write_records(folder / "plain.jsonl", plain), write_records(folder / "by_hand.jsonl", by_hand)


def arguments(model, file, out, *more) -> list[str]:
    small = ["--max-frames", "4", "--min-pixels", "40000", "--batch-size", "2", "--workers", "0", "--dtype", "float32"]
    return ["analyze", str(model), str(file), "--out", str(out), *small, *map(str, more)]


def measure(q: np.ndarray, mask: np.ndarray) -> list[float]:
    """The metrics of attention q [h, w] that sums to 1, and a mask [Hm, Wm], each by its definition."""
    (h, w), (high, wide) = q.shape, mask.shape
    share = mask.repeat(h, 0).repeat(w, 1).reshape(h, high, w, wide).mean((1, 3))
    best = np.unravel_index(q.argmax(), q.shape)
    top = np.sort(np.argsort(-q, axis=None)[: int(np.ceil(q.size / 20))])
    p = (q - q.min()) / (q.max() - q.min())
    return [
        -(q * np.log(q)).sum() / np.log(q.size),
        (q * share).sum(),
        mask[int((best[0] + 0.5) * high / h), int((best[1] + 0.5) * wide / w)],
        share.flatten()[top].mean(),
        (p * share).sum() / (p + share - p * share).sum(),
    ]


def in_full(folder, file, softmax):
    """Layer, or "fused" -> class -> metrics; and layer -> token -> causal share of every word token, by record."""
    model = load_model(folder, Inference(dtype="float32", attention="eager"), "cpu").double()
    processor = AutoProcessor.from_pretrained(folder)
    sampling = Sampling(max_frames=4, min_pixels=40000)
    builder = SampleBuilder(processor, sampling, supervision=Supervision(softmax="causal", read_out="all"))
    found, visual_shares, shares = {}, {}, []
    for item, classes in zip(RecordFile(file), QUESTIONS.values(), strict=True):
        sample = builder(item)
        batch = Collator(processor, frames=True)([sample])
        with torch.no_grad():
            inputs = model_inputs(batch, "cpu", torch.float64)
            attention = model(**inputs, output_attentions=True).attentions
        heads = np.stack([layer[0].numpy() for layer in attention])  # [layers, heads, L, L]
        visual = sample.inputs["mm_token_type_ids"].numpy() != 0
        shares.append(heads.mean(1)[:, [row.position for row in sample.rows]])
        for pair in sample.pairs:
            row, cells = sample.rows[pair.row], pair.height * pair.width
            keys = sample.key_sets[0].numpy()[pair.start : pair.start + cells]
            a = heads[:, :, row.position]
            if softmax != "causal":
                a = a / a[:, :, keys if softmax == "frame" else visual].sum(-1, keepdims=True)
            maps = a.mean(1)[:, keys].reshape(-1, pair.height, pair.width)
            for name, q in {"0": maps[0], "1": maps[1], "fused": maps.mean(0)}.items():
                kind = KINDS[classes[sample.tags[pair.row]]]
                values = measure(q / q.sum(), sample.masks[pair.mask].numpy().astype(float))
                found.setdefault((name, kind), []).append(values)
        for row, tag in zip(sample.rows, sample.tags, strict=True):
            each = heads[:, :, row.position][..., visual].sum(-1).mean(1)
            for name, value in {"0": each[0], "1": each[1], "fused": each.mean()}.items():
                visual_shares.setdefault((name, KINDS[classes[tag]]), []).append(value)
    return {
        key: dict(zip(METRICS, [*np.mean(found[key], 0), np.mean(visual_shares[key])], strict=True)) for key in found
    }, shares


@pytest.mark.parametrize("softmax", ["frame", "visual", "causal"])
def test_every_figure_is_that_of_the_whole_matrix(checkpoint, files, tmp_path, softmax):
    plain, by_hand = files
    assert main(arguments(checkpoint, plain, tmp_path, "--layers=0,1", "--softmax", softmax)) == 0
    found = results(tmp_path)
    assert found["settings"]["softmax"] == softmax and found["records"] == 3
    expected, _ = in_full(checkpoint, by_hand, softmax)
    for (name, kind), values in expected.items():
        measured = (found["fused"] if name == "fused" else found["layers"][name])[kind]
        assert {key: measured[key] for key in METRICS} == pytest.approx(values, rel=2e-4), (name, kind)
    assert {kind for _, kind in expected} == set(found["fused"])
    assert found["words"] == {"noun": 3, "attribute": 5, "other noun": 1, "function word": 7}
    assert found["not_analysed"] == 1 and found["without"] == 2 and list(found["problems"]) == ["5"]
    with open(tmp_path / "words.csv") as file:
        rows = list(csv.DictReader(file))
    entropy = found["layers"]["0"]["noun"]["entropy"]
    assert len(rows) == 3 * 4 and float(rows[0]["entropy"]) == pytest.approx(entropy, rel=1e-4)
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")


def test_sinks_are_tokens_to_which_every_word_attends(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr("swim_fast.analysis.measure._SINK", 0.0)
    monkeypatch.setattr("swim_fast.analysis.measure._SINK_OVER_EVEN", 0.9)  # an untrained model attends evenly
    monkeypatch.setattr("swim_fast.analysis.run._SHOWN_SINKS", 10**6)
    plain, by_hand = files
    assert main(arguments(checkpoint, plain, tmp_path, "--layers=0,1", "--softmax", "frame")) == 0
    _, shares = in_full(checkpoint, by_hand, "frame")
    names = results(tmp_path)["sinks"]
    for layer in (0, 1):
        first = [one[layer][:, 0] for one in shares]
        lasts = [int((one[layer] > 0).any(0).nonzero()[0].max()) + 1 for one in shares]
        expected = [each.mean() for each, last in zip(first, lasts, strict=True) if each.min() >= 0.9 / last]
        named = {sink["token"]: sink for sink in names[str(layer)]}
        assert ("first token" in named) == bool(expected)
        if expected:
            assert named["first token"]["samples"] == len(expected)
            assert named["first token"]["share"] == pytest.approx(np.mean(expected), rel=1e-4)
    tokens = {sink["token"] for sinks in names.values() for sink in sinks}
    assert tokens and any(token.startswith("visual, patch ") for token in tokens)


def test_a_second_run_analyses_the_rest_and_compares(checkpoint, files, tmp_path, capsys):
    words = arguments(checkpoint, files[0], tmp_path, "--against", checkpoint)
    assert main([*words, "--limit", "1"]) == 0
    assert main(words) == 0
    kept = [entry["record"] for entry in lines(tmp_path / "predictions-rank0.jsonl")[1:]]
    assert kept[0] == 0 and sorted(kept) == [0, 1, 2, 3, 4, 5]
    found = results(tmp_path)
    for kind, values in found["fused"].items():
        assert found["against"]["fused"][kind] == pytest.approx(values, rel=1e-5)
    assert f"layers: {found['suggested_layers']}" in capsys.readouterr().out
    best = max(found["layers"], key=lambda layer: found["layers"][layer]["noun"]["mass_in_mask"])
    assert found["suggested_layers"] == [int(best)] and found["fused_layers"] == [1]
    assert main([*words, "--softmax", "causal"]) == 2
    assert "softmax was 'frame' and is 'causal'" in capsys.readouterr().err


def test_missing_tagger_is_named(checkpoint, files, tmp_path, capsys, monkeypatch):
    from swim_fast.nl_refer.english import phrases

    monkeypatch.setitem(sys.modules, "HanTa", None)
    phrases._tagger.cache_clear()
    assert main(arguments(checkpoint, files[0], tmp_path)) == 2
    assert "pip install 'swim-fast[nl-refer]'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_give_the_results_of_one(checkpoint, files, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(arguments(checkpoint, files[0], one)) == 0
    run(*arguments(checkpoint, files[0], two), ranks=2)
    assert (two / "predictions-rank1.jsonl").exists()
    for kind, values in results(one)["fused"].items():
        assert results(two)["fused"][kind] == pytest.approx(values, rel=1e-4)
    assert results(two)["words"] == results(one)["words"]
