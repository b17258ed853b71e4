"""Results on disk and for people: one JSON file, and one table as Markdown that reads well as plain text."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swim_fast.errors import name_count
from swim_fast.evaluation import published
from swim_fast.evaluation.judge import DIMENSIONS
from swim_fast.evaluation.questions import READINGS
from swim_fast.files import atomic_write
from swim_fast.options import METRICS, RANKING_METRICS

_READINGS = {
    "published": "letter in the answer, published rule",
    "lenient": "letter in the answer, lenient rule",
    "letter": "likelihood of the option's letter",
    "total": "likelihood of the option's text",
    "mean": "likelihood of the option's text, per token",
}
_POINTED_OUT = {"text": "object named in words", "single": "single", "multi": "multi"}
_SHOWN_PROBLEMS = 5


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with columns of even width; all but the first and the last are flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    right = [0 < i < len(head) - 1 for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = (text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(cells)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def questions_report(results: Mapping[str, Any]) -> str:
    """Return the table of `score_questions` with published numbers beside one's own."""
    settings, by = results["settings"], results["by"]
    kinds = list(dict.fromkeys((*published.QUESTION_TYPES, *results["readings"][READINGS[by][0]]["types"])))
    rows = []
    for reading in READINGS[by]:
        found = results["readings"][reading]
        counts = [found["types"].get(kind, {}) for kind in kinds]
        where = f"{_READINGS[reading]}; object named in words; up to {settings['max_frames']} frames"
        values = [_number(count.get("accuracy"), 1) for count in (*counts, found["all"])]
        rows.append([settings["model"], "text", *values, where])
    rows += _published_rows(published.QUESTIONS, len(kinds), 1)
    head = ["model", "prompt", *(kind.removesuffix(" Questions") for kind in kinds), "all", "conditions"]
    lines = ["# VideoRefer-Bench-Q: accuracy, per cent", "", table(head, rows), "", _file_line(results)]
    for reading in READINGS[by]:
        count = results["readings"][reading]["all"]
        unparsable = f", {count['unparsable']} unparsable, which count as wrong" if by == "generation" else ""
        lines.append(f"{_READINGS[reading]}: {count['right']} of {count['answers']} right{unparsable}")
    return "\n".join([*lines, *problem_lines(results["problems"], "no answer"), "", published.QUESTIONS_NOTE])


def descriptions_report(results: Mapping[str, Any]) -> str:
    """Return the table of `score_descriptions` with published numbers beside one's own."""
    settings, means = results["settings"], results["means"]
    head = ["model", "prompt", *DIMENSIONS, "mean", "conditions"]
    lines = ["# VideoRefer-Bench-D: scores from 0 to 5", ""]
    if means:
        prompt = "text" if settings["frame_mode"] == "text" else "drawn"
        own = [settings["model"], prompt, *(_number(means[name], 2) for name in DIMENSIONS)]
        own.append(_number(results["average"], 2))
        temperature = settings["judge_temperature"]
        temperature = "its default" if temperature is None else format(temperature, "g")
        own.append(
            f"{_POINTED_OUT[settings['frame_mode']]}; up to {settings['max_frames']} frames; "
            f"judge {settings['judge']}, temperature {temperature}, prompt {settings['judge_prompt']}"
        )
        lines += [table(head, [own, *_published_rows(published.DESCRIPTIONS, len(DIMENSIONS), 2)]), ""]
    lines.append(_file_line(results))
    lines.append(f"{results['described']} descriptions, {len(results['scores'])} of them judged")
    if results["failed"]:
        lines += _listed(results["failed"], "descriptions without scores, which count nowhere")
    lines += problem_lines(results["problems"], "no description")
    return "\n".join([*lines, "", published.DESCRIPTIONS_NOTE] if means else lines)


def grounding_report(results: Mapping[str, Any]) -> str:
    """Return the tables of `score_grounding`, published rows below the second; fused layers carry an asterisk."""
    fused, ranking = results["fused_layers"], results["ranking"]
    how = f"{results['settings']['fusion']} of {', '.join(map(str, fused))}"
    head = ["layer", *(name.replace("_", " ") for name in METRICS), ""]
    lines = ["# Attention of the tagged nouns", "", table(head, _layer_rows(results, METRICS, fused, how)), ""]
    lines.append(f"{results['pairs']} pairs of noun token and temporal patch, in {results['records']} records")
    if results["without"]:
        lines.append(f"without a tagged noun with a mask: {name_count(results['without'], 'record')}")
    lines.append("definitions: swim_fast/loss/metrics.py")
    rows = _layer_rows(ranking, RANKING_METRICS, fused, how)
    for model, values in published.ATTENTION.items():
        rows.append([f"{model} (published)", *(_number(values.get(name), 3) for name in RANKING_METRICS), ""])
    lines += ["", "## Pixels of the masks, ranked by the maps", ""]
    lines += [table(["layer", *RANKING_METRICS.values(), ""], rows), ""]
    lines.append(f"{ranking['pairs']} pairs whose mask is neither empty nor full")
    lines.append("GP@N%, GP@N: GamePoint@P and @K; definitions: swim_fast/loss/ranking_metrics.py")
    return "\n".join([*lines, *problem_lines(results["problems"], "no result"), "", published.ATTENTION_NOTE])


def _layer_rows(averages: Mapping[str, Any], names: Iterable[str], fused: Collection[int], how: str) -> list[list[str]]:
    """Return one row per layer and one of the fused layers."""
    found = {f"{layer}{' *' if int(layer) in fused else ''}": values for layer, values in averages["layers"].items()}
    found["fused"] = averages["fused"]
    return [
        [layer, *(_number(values[name], 3) for name in names), how if layer == "fused" else ""]
        for layer, values in found.items()
    ]


def write_report(folder: Path, results: Mapping[str, Any], report: str) -> None:
    """Write `results.json` and `results.md`; of descriptions also `scores.jsonl`, with what they depend on."""
    settings = results["settings"]
    texts = {"results.json": json.dumps(results, indent=2) + "\n", "results.md": report + "\n"}
    if "judge" in settings:
        about = {name: settings[name] for name in ("judge", "judge_temperature", "judge_prompt", "frame_mode")}
        rows = {**results["scores"], **{index: {"failed": reason} for index, reason in results["failed"].items()}}
        lines = [json.dumps({"record": index, **row, **about}) + "\n" for index, row in sorted(rows.items())]
        texts["scores.jsonl"] = "".join(lines)
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text)


def _file_line(results: Mapping[str, Any]) -> str:
    return f"{results['settings']['file']}, a {results['kind']}"


def _published_rows(rows: Sequence[published.Published], columns: int, digits: int) -> list[list[str]]:
    """Return rows of `table`: model, prompt, values, average, conditions; "-" where a value is not known."""
    found = []
    for row in rows:
        values = [f"{value:.{digits}f}" for value in row.values] + ["-"] * (columns - len(row.values))
        found.append([f"{row.model} (published)", row.prompt, *values, f"{row.average:.{digits}f}", row.conditions])
    return found


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def problem_lines(problems: Mapping[int, str], what: str) -> list[str]:
    """Return lines that name the first records of which nothing is known; none without problems."""
    return _listed(problems, f"records with {what}, which count nowhere") if problems else []


def _listed(reasons: Mapping[int, str], what: str) -> list[str]:
    shown = [f"- record {index}: {reason}" for index, reason in list(reasons.items())[:_SHOWN_PROBLEMS]]
    rest = [f"- … and {len(reasons) - len(shown)} more in results.json"] if len(reasons) > len(shown) else []
    return ["", f"{len(reasons)} {what}:", "", *shown, *rest]
