"""`swim-fast evaluate …`: the options of each job, and what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from swim_fast.errors import OptionError, explain
from swim_fast.options import Options

Job = TypeVar("Job", bound=Options)


def read_options(job: type[Job], args: argparse.Namespace) -> Job:
    """Return the options of a job that a command line gives.

    Raises:
        OptionError: spelled as on the command line.
    """
    try:
        return job.model_validate({name: value for name, value in vars(args).items() if name in job.model_fields})
    except ValidationError as error:
        mistakes = (explain(mistake, lambda path: f"--{path[-1]}".replace("_", "-")) for mistake in error.errors())
        raise OptionError("; ".join(mistakes)) from None


def _evaluate(options: Options, evaluate: Callable, report: Callable) -> dict | None:
    """Run an evaluation; write and print what the first rank has."""
    from swim_fast.evaluation.report import write_report
    from swim_fast.evaluation.run import running_ranks

    with running_ranks() as ranks:
        results = evaluate(options, ranks)
        if results is not None:
            text, folder = report(results), Path(options.out)
            write_report(folder, results, text)
            print(f"{text}\n\n{folder / 'results.md'}  {folder / 'results.json'}")
        return results


def _questions(args: argparse.Namespace) -> int:
    from swim_fast.evaluation.questions import evaluate_questions
    from swim_fast.evaluation.report import questions_report
    from swim_fast.jobs import Questions

    _evaluate(read_options(Questions, args), evaluate_questions, questions_report)
    return 0


def _descriptions(args: argparse.Namespace) -> int:
    from swim_fast.evaluation.descriptions import evaluate_descriptions
    from swim_fast.evaluation.report import descriptions_report
    from swim_fast.jobs import Descriptions

    _evaluate(read_options(Descriptions, args), evaluate_descriptions, descriptions_report)
    return 0


def _grounding(args: argparse.Namespace) -> int:
    from swim_fast.evaluation.grounding import evaluate_grounding
    from swim_fast.evaluation.report import grounding_report
    from swim_fast.jobs import Grounding
    from swim_fast.viz.charts import draw_layers

    options = read_options(Grounding, args)
    results = _evaluate(options, evaluate_grounding, grounding_report)
    if results is not None and results["layers"]:
        path = Path(options.out) / "layers.png"
        layers = {int(layer): values for layer, values in results["layers"].items()}
        draw_layers(path, layers, results["fused"], results["fused_layers"])
        print(path)
    return 0


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("model", help="checkpoint: folder or name on the Hugging Face hub")
    common.add_argument("file", help="JSON list or JSONL of records")
    common.add_argument("--out", required=True, help="folder of predictions and results; a run that was ended goes on")
    common.add_argument("--media", help="folder that media paths are relative to (default: the file's own)")
    common.add_argument("--limit", type=int, help="only so many records, from the first")
    common.add_argument("--max-frames", type=int, help="most frames of a clip")
    common.add_argument("--max-pixels", type=int, help="of a frame (default: the processor's own)")
    common.add_argument("--folder-fps", type=float, help="frames per second of clips that are folders (default: 1)")
    common.add_argument("--batch-size", type=int)
    common.add_argument("--dtype", help="auto (the checkpoint's own), bfloat16, float16, float32")
    common.add_argument("--attention", help="as attn_implementation of transformers")
    common.add_argument("--reader", choices=("decord", "torchcodec", "pyav"))
    common.add_argument("--decode-timeout", type=float, help="seconds for one clip")
    common.add_argument("--workers", type=int, help="decoding processes of each rank")
    return common


def add_jobs(jobs: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` and its jobs to the command line's."""
    jobs = jobs.add_parser("evaluate", help="VideoRefer-Bench Q and D, and grounding, of a checkpoint")
    jobs = jobs.add_subparsers(required=True, metavar="JOB")
    common = _common()

    job = jobs.add_parser(
        "questions", parents=[common], argument_default=argparse.SUPPRESS, help="VideoRefer-Bench-Q: multiple choice"
    )
    job.add_argument(
        "--by",
        choices=("generation", "likelihood"),
        help="the letter in the greedy answer (default), or the option that the model finds likeliest",
    )
    job.add_argument("--max-new-tokens", type=int, help="of an answer")
    job.set_defaults(run=_questions)

    job = jobs.add_parser(
        "descriptions",
        parents=[common],
        argument_default=argparse.SUPPRESS,
        help="VideoRefer-Bench-D: descriptions, scored by a judge",
    )
    job.add_argument("--max-new-tokens", type=int, help="of a description")
    job.add_argument(
        "--frame-mode",
        choices=("text", "single", "multi"),
        help="how the object is pointed out, recorded with the scores: in words alone (default), or also drawn into "
        "one or all frames of the clips",
    )
    job.add_argument("--judge-only", action="store_true", help="judge the predictions that --out has; load no model")
    judge = job.add_argument_group("judge (without one: predictions only; the key is read from OPENAI_API_KEY)")
    judge.add_argument("--judge-model", help="its name at the endpoint")
    judge.add_argument("--base-url", help="of any OpenAI-compatible API, e.g. http://localhost:8000/v1")
    judge.add_argument("--temperature", type=float)
    judge.add_argument("--attempts", type=int, help="answers per description until one can be read")
    judge.add_argument("--concurrency", type=int, help="requests at the same time")
    judge.add_argument("--retries", type=int, help="of a request that got no answer")
    judge.add_argument("--backoff", type=float, help="seconds before the first retry; then doubled")
    judge.add_argument("--timeout", type=float, help="seconds for one request")
    judge.add_argument("--journal", help="file of the answers paid for (default: in --out)")
    job.set_defaults(run=_descriptions)

    job = jobs.add_parser(
        "grounding",
        parents=[common],
        argument_default=argparse.SUPPRESS,
        help="where the attention of tagged nouns lies, by layer",
    )
    job.add_argument("--layers", help="all (default), supervised, or numbers such as 2,7,12")
    job.add_argument("--fusion", choices=("product", "mean"), help="of the supervised layers")
    job.add_argument("--query-position", choices=("noun", "predictor"))
    job.add_argument("--softmax", choices=("causal", "full"))
    job.add_argument("--backend", choices=("auto", "torch", "triton", "eager"), help="of the kernels")
    job.set_defaults(run=_grounding)
