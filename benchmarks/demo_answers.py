"""Answers of the demo over seeds, with and without the attention loss: `python -m benchmarks.demo_answers`."""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.core import RecordFile, Target, describe_machine, in_new_process, markdown_table, targets_table
from swim_fast.demo.run import GOAL, RUNS, WITH, WITHOUT, WRONG

HERE = Path(__file__).parent
SEEDS = tuple(range(1, 9))  # fixed before any was run; all choices were made on the data of seed 0
LONGER = 3  # times the steps of the demo, of the further run without the loss
CLIPS = 800, 60  # to train on, held out

_INTRODUCTION = """# Does the attention loss teach to answer?

Written by `python -m benchmarks.demo_answers`, on a CPU, with the demo's settings (`configs/demo.yaml`) and seeds that
were fixed beforehand; a seed gives clips, weights and order. Answers: share of the questions about held-out clips whose
greedy answer is right, word for word, after {steps} steps; chance is 1/3. *Steps*: the first evaluation, of one every
{every} steps, at which {goal:.0%} were right; `–` if none was. *Wrong masks*: the attention loss with the masks of
another object of the clip. *{longer} × steps*: text loss alone, trained {longer} times as long.

It is a matter of how many steps and clips are needed, not of what can be learnt: text alone gets there later. A tiny
model on rendered clips says nothing of a model of 7 B parameters. {done} of {all} seeds are measured so far."""


@dataclass(frozen=True)
class Record:
    """A row of the CSV: one training run."""

    run: str
    seed: int
    steps: int
    answer_accuracy: float
    steps_to_goal: int | None
    pointing_accuracy: float
    mass_in_mask: float
    soft_iou: float
    cpu: str = ""
    threads: int = 0
    torch: str = ""
    python: str = ""


def open_records(path: Path) -> RecordFile[Record]:
    return RecordFile(path, Record, "run", "seed", "steps")


def measure(name: str, seed: int, steps: int, folder: Path) -> Record:
    """Train one run of a seed in this process, on one thread, and score it as the demo does."""
    import torch

    from swim_fast.config import load_config
    from swim_fast.demo.clips import DemoData
    from swim_fast.demo.run import configure, prepare, train_run

    torch.set_num_threads(1)
    home = folder / str(seed)
    values = {
        "model.path": home / "start",
        "data.train": f"[{{path: {home / 'data' / 'train.jsonl'}}}]",
        "data.eval": f"{{heldout: {{path: {home / 'data' / 'heldout.jsonl'}}}}}",
        "training.output_dir": home,
        "training.seed": seed,
        "training.max_steps": steps,
        "training.save_strategy": "no",
        "training.report_to": "none",
        "training.disable_tqdm": "true",
    }
    config = load_config("demo", [f"{key}={value}" for key, value in values.items()])
    # the weights are written last: where they are, an earlier run of the seed has made everything
    data = DemoData.of(home / "data") if (home / "start/model.safetensors").is_file() else prepare(config, *CLIPS)
    return Record(run=name, seed=seed, steps=steps, **train_run(configure(config, name, data)), **describe_machine())


def measure_all(seeds: Iterable[int], folder: Path, path: Path) -> None:
    """Measure what the CSV does not hold yet, the longer runs last; every record is written at once."""
    from swim_fast.config import load_config

    steps = load_config("demo").training["max_steps"]
    wanted = [*itertools.product(seeds, RUNS, [steps]), *itertools.product(seeds, [WITHOUT], [LONGER * steps])]
    file = open_records(path)
    missing = [(name, seed, count) for seed, name, count in wanted if (name, seed, count) not in file.records]
    for number, job in enumerate(missing, 1):
        record = in_new_process(measure, *job, folder)  # a run leaves its threads and its seeds behind
        file.put(record)
        print(f"{number} of {len(missing)}: seed {record.seed}, {record.run}: {record.answer_accuracy:.3f}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def draw_text(records: Iterable[Record]) -> str:
    """Return the report: targets, and a row for each seed."""
    from swim_fast.config import load_config

    found = {(record.run, record.seed, record.steps): record for record in records}
    steps = min(count for _, _, count in found)
    seeds = [seed for seed in sorted({seed for _, seed, _ in found}) if all((n, seed, steps) in found for n in RUNS)]
    rows, columns = [], {name: [found[name, seed, steps] for seed in seeds] for name in RUNS}
    for index, seed in enumerate(seeds):
        runs = {name: column[index] for name, column in columns.items()}
        longer = found.get((WITHOUT, seed, LONGER * steps))
        reached = longer or runs[WITHOUT]
        cells = [f"{runs[name].answer_accuracy:.3f}" for name in RUNS]
        cells += [f"{longer.answer_accuracy:.3f}" if longer else None]
        cells += [runs[WITH].steps_to_goal or "–", reached.steps_to_goal or f"> {reached.steps}"]
        rows.append((seed, *cells, *(f"{runs[name].pointing_accuracy:.3f}" for name in RUNS)))
    header = ("seed", *(f"answers: {label}" for label in RUNS.values()), f"text loss only, {LONGER} × steps")
    header += ("steps, attention loss", "steps, text loss only", *(f"pointing: {label}" for label in RUNS.values()))
    targets = _targets(columns, [found.get((WITHOUT, seed, LONGER * steps)) for seed in seeds]) if seeds else []
    machines = sorted({(r.cpu, r.torch, r.python) for r in found.values()})
    lines = [f"{cpu}, one thread and a data worker; torch {torch}, Python {python}." for cpu, torch, python in machines]
    every = load_config("demo").training["eval_steps"]
    facts = {"steps": steps, "every": every, "goal": GOAL, "longer": LONGER, "done": len(seeds), "all": len(SEEDS)}
    table = markdown_table(header, "r" * len(header), rows)
    return "\n".join([_INTRODUCTION.format(**facts), "", *targets_table(targets), "", *table, "", *lines, ""])


def _targets(columns: dict[str, list[Record]], longer: list[Record | None]) -> list[Target]:
    answers = {name: [record.answer_accuracy for record in column] for name, column in columns.items()}
    share = "{:.3f}".format
    found = [
        Target("median of answers, attention loss", statistics.median(answers[WITH]), 0.9, share, at_least=True),
        Target("lowest of answers, attention loss", min(answers[WITH]), 0.8, share, at_least=True),
        Target("median of answers, text loss only", statistics.median(answers[WITHOUT]), 0.6, share),
        Target("median of answers, wrong masks", statistics.median(answers[WRONG]), 0.6, share),
    ]
    if all(longer):
        # a run that never reached the goal needs more steps than it had
        least = [(record.steps_to_goal or record.steps) for record in longer]
        own = [record.steps_to_goal or record.steps for record in columns[WITH]]
        ratio = statistics.median(own) / statistics.median(least)
        found.append(Target("median steps to the goal, over those of text loss only", ratio, 0.5))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_answers", description=__doc__.split(":")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of clips, weights and order")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results; what is there is not run again")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_answers"), help="folder of the runs, removed")
    parser.add_argument("--draw", action="store_true", help="only draw the table again from the CSV")
    args = parser.parse_args()
    path = args.output / "demo_answers.csv"
    if not args.draw:
        measure_all(args.seeds, args.folder, path)
    text = draw_text(open_records(path).records.values())
    (args.output / "demo_answers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
