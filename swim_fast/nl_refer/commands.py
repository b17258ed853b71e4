"""`swim-fast nl-refer …`: the options of each job, and what is printed."""

from __future__ import annotations

import argparse

from swim_fast.evaluation.commands import read_options


def _build(args: argparse.Namespace) -> int:
    from swim_fast.jobs import Build
    from swim_fast.nl_refer.build import build

    print(build(read_options(Build, args)))
    return 0


def _synonyms(args: argparse.Namespace) -> int:
    from swim_fast.jobs import Synonyms
    from swim_fast.nl_refer.synonyms import write_variant

    print(write_variant(read_options(Synonyms, args)))
    return 0


def _stats(args: argparse.Namespace) -> int:
    from swim_fast.jobs import Stats
    from swim_fast.nl_refer.stats import collect

    options = read_options(Stats, args)
    stats = collect(options)
    print(stats.table(top=options.top))
    if options.plot:
        stats.draw(options.plot, top=options.top)
        print(options.plot)
    return 0


def add_jobs(jobs: argparse._SubParsersAction) -> None:
    """Add ``nl-refer`` and its jobs to the command line's."""
    jobs = jobs.add_parser("nl-refer", help="VideoRefer to NL-Refer; variants and counts of such sets")
    jobs = jobs.add_subparsers(required=True, metavar="JOB")
    file = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    file.add_argument("file", help="JSON list or JSONL of records")
    file.add_argument("--limit", type=int, help="only so many records, from the first")

    job = jobs.add_parser(
        "build",
        parents=[file],
        argument_default=argparse.SUPPRESS,
        help="replace placeholders by expressions with a tagged noun",
    )
    job.add_argument("out", help="NL-Refer file to write: a JSON list if it ends in .json, else JSONL")
    job.add_argument("--rewriter", choices=("rules", "openai"), help="default: rules, offline")
    job.add_argument("--bind", choices=("number", "order"), help="masks to placeholders by number or by order")
    job.add_argument("--max-words", type=int, help="most words of an expression")
    job.add_argument("--review", help="file for the failures (default: beside the output)")
    job.add_argument(
        "--dry-run", action="store_true", help="write and ask nothing; count, and estimate tokens and cost"
    )
    model = job.add_argument_group("language model (--rewriter openai; the key is read from OPENAI_API_KEY)")
    model.add_argument("--model", help="its name at the endpoint")
    model.add_argument("--base-url", help="of any OpenAI-compatible API, e.g. http://localhost:8000/v1")
    model.add_argument("--concurrency", type=int, help="requests at the same time")
    model.add_argument("--attempts", type=int, help="answers per record until one is valid")
    model.add_argument("--retries", type=int, help="of a request that got no answer")
    model.add_argument("--backoff", type=float, help="seconds before the first retry; then doubled")
    model.add_argument("--timeout", type=float, help="seconds for one request")
    model.add_argument("--temperature", type=float)
    model.add_argument("--journal", help="file of the answers paid for (default: beside the output)")
    model.add_argument("--price-in", type=float, help="of a million tokens in")
    model.add_argument("--price-out", type=float, help="of a million tokens out")
    job.set_defaults(run=_build)

    job = jobs.add_parser(
        "synonyms",
        parents=[file],
        argument_default=argparse.SUPPRESS,
        help="write a variant with synonyms of the tagged nouns",
    )
    job.add_argument("out", help="file to write: a JSON list if it ends in .json, else JSONL")
    job.add_argument("--table", help="TSV of one's own: noun, tab, synonyms with commas; goes before the one built in")
    job.add_argument("--missing", choices=("keep", "drop"), help="records without a known synonym")
    job.add_argument("--seed", type=int)
    job.set_defaults(run=_synonyms)

    job = jobs.add_parser(
        "stats",
        parents=[file],
        argument_default=argparse.SUPPRESS,
        help="count nouns, tags, mask areas and annotated frames",
    )
    job.add_argument("--media", help="folder that media paths are relative to (default: the file's own)")
    job.add_argument("--reader", choices=("decord", "torchcodec", "pyav"), help="for sizes not stated")
    job.add_argument("--top", type=int, help="nouns to show")
    job.add_argument("--plot", metavar="PNG", help="draw the distributions")
    job.set_defaults(run=_stats)
