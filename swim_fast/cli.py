"""`swim-fast`: the tree of jobs, each with its options (`swim_fast.jobs`) and the function that does it.

A function imports what it needs when it is called, so that help and mistakes come at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from swim_fast import __version__, jobs
from swim_fast.command_line import add_options, flag, read_options
from swim_fast.errors import UserError, nearest
from swim_fast.options import Inference, Options
from swim_fast.preflight import check_input, check_judge, check_model, check_output, check_run, check_template
from swim_fast.quiet import quiet_libraries


def _train(options: jobs.Train) -> int:
    from swim_fast.config import load_config

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        check_run(config)
        from swim_fast.training.dry_run.report import dry_run

        report = dry_run(config, options.gpus, options.gpu_memory, options.limit)
        print(report)
        return 0 if report.fits else 1
    from swim_fast.training.run import train

    metrics = train(config, resume=options.resume)
    if "skipped_samples" in metrics and os.environ.get("RANK", "0") == "0":  # the run has reached its end
        from swim_fast.training.progress import format_ending

        print(format_ending(config, metrics), flush=True)
    return 0


def _doctor(options: jobs.Doctor) -> int:
    from swim_fast.doctor import examine

    if options.format == "json":
        report = examine()
        print(report.as_json())
    else:
        report = examine(partial(print, flush=True))
    return 0 if report.usable else 1


def _config_init(options: jobs.ConfigInit) -> int:
    from swim_fast.config_init import write_config

    print(write_config(options))
    return 0


def _completion(options: jobs.Completion) -> int:
    from swim_fast.completion import completion_script

    print(completion_script(build_parser(), options.shell), end="")
    return 0


def _demo(options: jobs.Demo) -> int:
    from swim_fast.demo.run import run_demo

    config, overrides = options.config, options.overrides
    if "=" in config:  # no file is named: this is the first override
        config, overrides = "demo", [config, *overrides]
    run_demo(config, overrides, train_clips=options.train_clips, heldout_clips=options.heldout_clips)
    return 0


def _report(options: jobs.Report) -> int:
    from swim_fast.report.run import write_report

    print(write_report(options.runs, options.out, options.clips, options.max_new_tokens, options.part(Inference)))
    return 0


def _describe(options: jobs.Describe) -> int:
    check_model(options.model, "--model")
    check_template(options.model, "--model")
    from swim_fast.inference.describe import describe

    for file in describe(options).files:
        print(file)
    return 0


def _check(options: jobs.Check) -> int:
    check_input(options.file, "file")
    if options.model is not None:
        check_model(options.model, "--model")
        check_template(options.model, "--model")
    from swim_fast.data.check import check_file
    from swim_fast.inference.loading import as_run, load_processor

    report = check_file(as_run(options), load_processor(options.model) if options.model else None)
    print(report)
    return 1 if report.problems else 0


def _import(options: jobs.Import) -> int:
    from swim_fast.importing.run import import_data

    print(import_data(options))
    return 0


def _show(options: jobs.Show) -> int:
    check_input(options.file, "file")
    check_model(options.model, "--model")
    check_template(options.model, "--model")
    from swim_fast.data.show import show_record
    from swim_fast.inference.loading import as_run, load_processor

    print(show_record(as_run(options), load_processor(options.model)))
    return 0


def _build(options: jobs.Build) -> int:
    from swim_fast.nl_refer.build import build

    print(build(options))
    return 0


def _synonyms(options: jobs.Synonyms) -> int:
    from swim_fast.nl_refer.synonyms import write_variant

    print(write_variant(options))
    return 0


def _stats(options: jobs.Stats) -> int:
    from swim_fast.nl_refer.stats import collect

    stats = collect(options)
    print(stats.table(top=options.top))
    if options.plot:
        stats.draw(options.plot, top=options.top)
        print(options.plot)
    return 0


def _evaluate(options: jobs.Evaluation, evaluate: Callable, report: Callable) -> dict | None:
    """Run an evaluation; the first rank returns, writes and prints the results."""
    from swim_fast.evaluation.report import write_report
    from swim_fast.evaluation.run import running_ranks

    with running_ranks() as ranks:
        results = evaluate(options, ranks)
        if results is not None:
            text, folder = report(results), Path(options.out)
            write_report(folder, results, text)
            print(f"{text}\n\n{folder / 'results.md'}  {folder / 'results.json'}")
        return results


def _preflight(options: jobs.Evaluation) -> None:
    """Check what an evaluation is given before torch is imported."""
    check_input(options.file, "file")
    check_judge(getattr(options, "judge_model", None))
    if not getattr(options, "judge_only", False):
        check_model(options.model, "model")
        check_template(options.model, "model")
    check_output(options.out, "--out")


def _questions(options: jobs.Questions) -> int:
    _preflight(options)
    from swim_fast.evaluation.questions import evaluate_questions
    from swim_fast.evaluation.report import questions_report

    _evaluate(options, evaluate_questions, questions_report)
    return 0


def _descriptions(options: jobs.Descriptions) -> int:
    _preflight(options)
    from swim_fast.evaluation.descriptions import evaluate_descriptions
    from swim_fast.evaluation.report import descriptions_report

    _evaluate(options, evaluate_descriptions, descriptions_report)
    return 0


def _grounding(options: jobs.Grounding) -> int:
    _preflight(options)
    from swim_fast.evaluation.grounding import evaluate_grounding
    from swim_fast.evaluation.report import grounding_report
    from swim_fast.viz.charts import draw_layers

    results = _evaluate(options, evaluate_grounding, grounding_report)
    if results is not None and results["layers"]:
        path = Path(options.out) / "layers.png"
        layers = {int(layer): values for layer, values in results["layers"].items()}
        draw_layers(path, layers, results["fused"], results["fused_layers"])
        print(path)
    return 0


def _analyze(options: jobs.Analyze) -> int:
    _preflight(options)
    if options.against is not None:
        check_model(options.against, "--against")
    from swim_fast.analysis.report import words_report, write_words
    from swim_fast.analysis.run import analyze

    results = _evaluate(options, analyze, words_report)
    if results is not None:
        print(*write_words(Path(options.out), results), sep="  ")
    return 0


JOBS = {
    "train": (jobs.Train, _train),
    "doctor": (jobs.Doctor, _doctor),
    "config init": (jobs.ConfigInit, _config_init),
    "completion": (jobs.Completion, _completion),
    "demo": (jobs.Demo, _demo),
    "describe": (jobs.Describe, _describe),
    "report": (jobs.Report, _report),
    "data check": (jobs.Check, _check),
    "data import": (jobs.Import, _import),
    "data show": (jobs.Show, _show),
    "nl-refer build": (jobs.Build, _build),
    "nl-refer synonyms": (jobs.Synonyms, _synonyms),
    "nl-refer stats": (jobs.Stats, _stats),
    "evaluate questions": (jobs.Questions, _questions),
    "evaluate descriptions": (jobs.Descriptions, _descriptions),
    "evaluate grounding": (jobs.Grounding, _grounding),
    "analyze": (jobs.Analyze, _analyze),
}
GROUPS = {
    "config": "configurations of runs",
    "data": "check, show or import data",
    "nl-refer": "VideoRefer to NL-Refer; variants and counts of such sets",
    "evaluate": "VideoRefer-Bench Q and D, and grounding, of a checkpoint",
}


SECTIONS = {  # of the help, in the order of a first hour: jobs, or groups of them
    "begin": ("demo", "doctor", "config", "completion"),
    "your data": ("data", "nl-refer"),
    "train": ("train",),
    "look and score": ("describe", "analyze", "report", "evaluate"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole tree."""
    parser = argparse.ArgumentParser(
        prog="swim-fast",
        usage="swim-fast [-h] [--version] JOB ...",
        description="Teach video language models where to look.\n\n" + _list_jobs(),
        epilog="New here? `swim-fast demo` shows the effect in minutes. `swim-fast JOB --help` tells all of a job.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swim-fast {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # comes from the deepspeed launcher
    # without help texts argparse does not list the jobs again
    tree = {"": parser.add_subparsers(prog="swim-fast", required=True, metavar="JOB", help=argparse.SUPPRESS)}
    for words, (options, function) in JOBS.items():
        group, _, name = words.rpartition(" ")
        if group not in tree:
            parent = tree[""].add_parser(group, description=GROUPS[group])
            tree[group] = parent.add_subparsers(required=True, metavar="JOB")
        text = options.__doc__.strip()
        told = {"help": _summary(options)} if group else {}
        epilog = f"example:\n  swim-fast {words} {options.example}".rstrip() if options.example else None
        job = tree[group].add_parser(name, **told, description=text, epilog=epilog, formatter_class=_Formatter)
        add_options(job, options)
        job.set_defaults(job=(options, function))
    return parser


class _Formatter(argparse.HelpFormatter):
    """Leaves the lines of an example as they are, and wraps everything else."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


def _summary(options: type[Options]) -> str:
    return options.__doc__.strip().partition("\n")[0].rstrip(".")


def _list_jobs() -> str:
    """Return all jobs under the headings of `SECTIONS`, one a line."""
    known = {group for groups in SECTIONS.values() for group in groups}
    others = tuple(dict.fromkeys(words.partition(" ")[0] for words in JOBS if words.partition(" ")[0] not in known))
    lines = []
    for title, groups in {**SECTIONS, "others": others}.items():
        found = [words for group in groups for words in JOBS if words.partition(" ")[0] == group]
        lines += ["", f"{title}:", *(f"  {words:<22}{_summary(JOBS[words][0])}" for words in found)] if found else []
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> int:
    """Run a job; return its exit status.

    0, or what it found: 1 for problems, 2 for what a user can mend, 130 for Ctrl-C, 143 for a run ended by SIGTERM.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    options, function = args.job
    if any("=" not in word or word.startswith("-") for word in rest) or (rest and "overrides" not in options.words):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_hint(options, rest)}")
    if rest:  # argparse takes positional words from one place only: these came after an option
        args.overrides = [*getattr(args, "overrides", []), *rest]
    try:
        return function(read_options(options, args))
    except UserError as error:
        print(f"swim-fast: {error}", file=sys.stderr)
        _end_rank(error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        print("swim-fast: interrupted", file=sys.stderr)
        return 130


def _end_rank(code: int) -> None:
    """End a process that is one of several ranks at once, without the destructors of its process group.

    gloo's threads, ended in no order while a peer leaves as well, at times abort the process, and the launcher would
    tell of a signal instead of the code.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _hint(options: type[Options], words: list[str]) -> str:
    flags = [flag(options, name) for name in options.model_fields if name not in options.words]
    unknown = next((word.partition("=")[0] for word in words if word.startswith("--")), None)
    hint = nearest(unknown, flags) if unknown else ""
    return f"; {hint}" if hint.startswith("did") else ""


if __name__ == "__main__":
    sys.exit(main())
