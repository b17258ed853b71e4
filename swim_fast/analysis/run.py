"""`swim-fast analyze`: what the words of referring expressions look at, over a file of any length."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swim_fast.analysis.measure import WORD_METRICS, average_words, measure_words
from swim_fast.analysis.samples import WordSample, build_word_sample
from swim_fast.analysis.words import CLASSES
from swim_fast.evaluation.grounding import attach_chosen_layers, choose_maps
from swim_fast.evaluation.run import Batch, Ranks, Run, Work
from swim_fast.jobs import Analyze
from swim_fast.nl_refer.english.phrases import tag_sentence
from swim_fast.options import NounRows

_SHOWN_SINKS = 5


def analyze(options: Analyze, ranks: Ranks) -> dict[str, Any] | None:
    """Measure the `WORD_METRICS` of each class of words, by layer.

    Rows, softmax, fusion and samples that the options do not name are those of the run that made `options.model`; of
    the model against which it is compared too.

    Returns:
        The results of `score_words`, with `settings`, and of the other model as `against`, on the first rank; None on
        the others.

    Raises:
        MissingLibraryError: HanTa is not installed.
        DataError, CheckpointError, ValueError, PredictionsError: as of `evaluate_grounding`.
    """
    tag_sentence("a word")  # fails here, not in a worker, where HanTa is absent
    run = Run(options, ranks)
    how = choose_maps(options, run.trained)
    results = _analyze_model(run, how)
    if options.against is not None:
        other = copy.copy(run)
        other.options = options.replace(model=options.against, out=str(Path(options.out) / "against"))
        against = _analyze_model(other, how)
        if results is not None:
            results["against"] = against
    return results


def _analyze_model(run: Run, how: dict[str, str]) -> dict[str, Any] | None:
    options = run.options
    rows = {name: how[name] for name in NounRows.model_fields}
    settings = run.settings("words", layers=options.layers, **how, classes=list(CLASSES), metrics=list(WORD_METRICS))

    def prepare() -> Work:
        model, processor = run.load()
        chosen, fused = attach_chosen_layers(model, options, run.trained)
        builder = run.sample_builder(processor, read_out="supervised", **rows)

        def predict(batch: Batch) -> list[dict[str, Any]]:
            samples: list[WordSample] = [sample for _, sample in batch]
            with_rows = [sample for sample in samples if sample.rows]
            measured = measure_words(model, processor, with_rows, chosen, fused, how["fusion"]) if with_rows else []
            found = iter(measured)
            return [
                {**(next(found) if sample.rows else {"sums": {}}), "fused_layers": fused}
                | {"not_analysed": sample.not_analysed, "without_mask": sample.tags_without_mask}
                for sample in samples
            ]

        return Work(lambda index: build_word_sample(builder, run.records[index]), predict)

    entries = run.predict(run.indices, settings, prepare, "words")
    if entries is None:
        return None
    return {"settings": settings, **score_words({n: entry for n, entry in entries.items() if n in run.indices})}


def score_words(entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Average over all pairs, and over all tokens.

    Args:
        entries: predictions by record index, see `measure_words`; or `problem`.

    Returns:
        `layers`: layer -> class -> `average_words`; `fused`: class -> the same of the `fused_layers`; `sinks`: layer,
        or "fused" -> the most frequent ones, with `token`, `samples` in which it is one, and its mean `share` there;
        `words`: class -> number; `not_analysed`: number of tagged nouns; `without_mask`: number of words without a
        mask in the frames taken; `records` with words, and those `without`; `suggested_layers`, as many as are fused,
        on which the nouns' mass in the mask is largest; `problems`: record index -> why nothing is known of it.
    """
    problems = {index: entry["problem"] for index, entry in entries.items() if "problem" in entry}
    kept = [entry for entry in entries.values() if "problem" not in entry]
    looked = [entry for entry in kept if entry["sums"]]
    totals: dict[str, dict[str, list[float]]] = defaultdict(dict)
    words: Counter[str] = Counter()
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in looked:
        words.update(entry["words"])
        for name, by_class in entry["sums"].items():
            for kind, values in by_class.items():
                total = totals[name].get(kind, [0.0] * len(values))
                totals[name][kind] = [a + b for a, b in zip(total, values, strict=True)]
        for name, found in entry["sinks"].items():
            for token, share in found.items():
                shares[name][token].append(share)
    averages = {
        name: {kind: average_words(totals[name][kind]) for kind in CLASSES if kind in totals[name]}
        for name in sorted(totals.keys() - {"fused"}, key=int)
    }
    fused_layers = looked[0]["fused_layers"] if looked else []
    return {
        "layers": averages,
        "fused": {kind: average_words(totals["fused"][kind]) for kind in CLASSES if kind in totals["fused"]},
        "fused_layers": fused_layers,
        "suggested_layers": _suggest_layers(averages, len(fused_layers)),
        "sinks": {name: _list_sinks(shares[name]) for name in (*averages, "fused") if name in shares},
        "words": {kind: words[kind] for kind in CLASSES if kind in words},
        "not_analysed": sum(entry["not_analysed"] for entry in kept),
        "without_mask": sum(entry["without_mask"] for entry in kept),
        "records": len(looked),
        "without": len(kept) - len(looked),
        "problems": problems,
    }


def _suggest_layers(averages: Mapping[str, Mapping[str, Mapping[str, float]]], count: int) -> list[int]:
    """Return the layers in which the nouns' mass in the mask is largest, ascending; none if no noun has a mask."""
    mass = {int(layer): found["noun"]["mass_in_mask"] for layer, found in averages.items() if "noun" in found}
    known = [layer for layer, value in mass.items() if value == value]
    return sorted(sorted(known, key=lambda layer: -mass[layer])[:count])


def _list_sinks(shares: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    found = sorted(shares.items(), key=lambda item: (-len(item[1]), -sum(item[1])))[:_SHOWN_SINKS]
    return [{"token": token, "samples": len(each), "share": sum(each) / len(each)} for token, each in found]
