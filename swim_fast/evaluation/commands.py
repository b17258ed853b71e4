"""`swim-fast evaluate …`: the options of each job, and what is printed."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path


def _run_options(args: argparse.Namespace):
    from swim_fast.evaluation.run import RunOptions

    names = (
        "model",
        "file",
        "media",
        "limit",
        "max_frames",
        "max_pixels",
        "batch_size",
        "dtype",
        "attention",
        "reader",
    )
    more = {name: getattr(args, name) for name in (*names, "folder_fps", "decode_timeout", "workers")}
    return RunOptions(out=Path(args.out), **more)


def _finish(args: argparse.Namespace, results, report) -> None:
    """Write and print what the first rank has."""
    from swim_fast.evaluation.report import write_report

    text = report(results)
    write_report(Path(args.out), results, text)
    print(f"{text}\n\n{Path(args.out) / 'results.md'}  {Path(args.out) / 'results.json'}")


def _questions(args: argparse.Namespace) -> int:
    from swim_fast.evaluation.questions import evaluate_questions
    from swim_fast.evaluation.ranks import running_ranks
    from swim_fast.evaluation.report import questions_report

    with running_ranks() as ranks:
        results = evaluate_questions(_run_options(args), ranks, args.by, args.max_new_tokens)
        if results is not None:
            _finish(args, results, questions_report)
    return 0


def _descriptions(args: argparse.Namespace) -> int:
    from swim_fast.evaluation.descriptions import JudgeOptions, evaluate_descriptions
    from swim_fast.evaluation.ranks import running_ranks
    from swim_fast.evaluation.report import descriptions_report
    from swim_fast.llm.endpoint import EndpointOptions

    for name in ("httpx", "httpx2"):  # would write a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    judging = None
    if args.judge_model is not None:
        endpoint = EndpointOptions(
            args.judge_model,
            args.base_url,
            args.concurrency,
            args.timeout,
            args.retries,
            args.backoff,
            args.temperature,
        )
        judging = JudgeOptions(endpoint, Path(args.journal) if args.journal else None, args.attempts)
    with running_ranks() as ranks:
        results = evaluate_descriptions(
            _run_options(args),
            ranks,
            judging,
            judge_only=args.judge_only,
            frame_mode=args.frame_mode,
            max_new_tokens=args.max_new_tokens,
        )
        if results is not None:
            _finish(args, results, descriptions_report)
    return 0


def _grounding(args: argparse.Namespace) -> int:
    from swim_fast.evaluation.grounding import draw_grounding, evaluate_grounding, read_layers
    from swim_fast.evaluation.ranks import running_ranks
    from swim_fast.evaluation.report import grounding_report

    layers = read_layers(args.layers)
    how = {name: getattr(args, name) for name in ("fusion", "query_position", "softmax", "backend")}
    with running_ranks() as ranks:
        results = evaluate_grounding(_run_options(args), ranks, layers, **how)
        if results is not None:
            _finish(args, results, grounding_report)
            if results["layers"]:
                draw_grounding(results, Path(args.out) / "layers.png")
                print(Path(args.out) / "layers.png")
    return 0


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", help="checkpoint: folder or name on the Hugging Face hub")
    common.add_argument("file", help="JSON list or JSONL of records")
    common.add_argument("--out", required=True, help="folder of predictions and results; a run that was ended goes on")
    common.add_argument("--media", help="folder that media paths are relative to (default: the file's own)")
    common.add_argument("--limit", type=int, help="only so many records, from the first")
    common.add_argument("--max-frames", type=int, default=32, help="most frames of a clip")
    common.add_argument("--max-pixels", type=int, help="of a frame (default: the processor's own)")
    common.add_argument(
        "--folder-fps", type=float, default=1.0, help="frames per second of clips that are folders (default: 1)"
    )
    common.add_argument("--batch-size", type=int, default=4)
    common.add_argument("--dtype", default="auto", help="auto (the checkpoint's own), bfloat16, float16, float32")
    common.add_argument("--attention", default="sdpa", help="as attn_implementation of transformers")
    common.add_argument("--reader", default="decord", choices=("decord", "torchcodec", "pyav"))
    common.add_argument("--decode-timeout", type=float, default=60.0, help="seconds for one clip")
    common.add_argument("--workers", type=int, default=2, help="decoding processes of each rank")
    return common


def add_jobs(jobs: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` and its jobs to the command line's."""
    jobs = jobs.add_parser("evaluate", help="VideoRefer-Bench Q and D, and grounding, of a checkpoint")
    jobs = jobs.add_subparsers(required=True, metavar="JOB")
    common = _common()

    job = jobs.add_parser("questions", parents=[common], help="VideoRefer-Bench-Q: multiple choice")
    job.add_argument(
        "--by",
        default="generation",
        choices=("generation", "likelihood"),
        help="the letter in the greedy answer (default), or the option that the model finds likeliest",
    )
    job.add_argument("--max-new-tokens", type=int, default=16, help="of an answer")
    job.set_defaults(run=_questions)

    job = jobs.add_parser("descriptions", parents=[common], help="VideoRefer-Bench-D: descriptions, scored by a judge")
    job.add_argument("--max-new-tokens", type=int, default=256, help="of a description")
    job.add_argument(
        "--frame-mode",
        default="text",
        choices=("text", "single", "multi"),
        help="how the object is pointed out, recorded with the scores: in words alone (default), or also drawn into "
        "one or all frames of the clips",
    )
    job.add_argument("--judge-only", action="store_true", help="judge the predictions that --out has; load no model")
    judge = job.add_argument_group("judge (without one: predictions only; the key is read from OPENAI_API_KEY)")
    judge.add_argument("--judge-model", help="its name at the endpoint")
    judge.add_argument("--base-url", help="of any OpenAI-compatible API, e.g. http://localhost:8000/v1")
    judge.add_argument("--temperature", type=float, default=0.0)
    judge.add_argument("--attempts", type=int, default=3, help="answers per description until one can be read")
    judge.add_argument("--concurrency", type=int, default=16, help="requests at the same time")
    judge.add_argument("--retries", type=int, default=8, help="of a request that got no answer")
    judge.add_argument("--backoff", type=float, default=1.0, help="seconds before the first retry; then doubled")
    judge.add_argument("--timeout", type=float, default=60.0, help="seconds for one request")
    judge.add_argument("--journal", help="file of the answers paid for (default: in --out)")
    job.set_defaults(run=_descriptions)

    job = jobs.add_parser("grounding", parents=[common], help="where the attention of tagged nouns lies, by layer")
    job.add_argument("--layers", default="all", help="all (default), supervised, or numbers such as 2,7,12")
    job.add_argument("--fusion", default="product", choices=("product", "mean"), help="of the supervised layers")
    job.add_argument("--query-position", default="noun", choices=("noun", "predictor"))
    job.add_argument("--softmax", default="causal", choices=("causal", "full"))
    job.add_argument("--backend", default="auto", choices=("auto", "torch", "triton", "eager"), help="of the kernels")
    job.set_defaults(run=_grounding)
