"""`swim-fast`: one command, a sub-command per job."""

import argparse
import logging
import sys

from swim_fast.evaluation.commands import add_jobs as add_evaluation
from swim_fast.nl_refer.commands import add_jobs as add_nl_refer


def _train(args) -> int:
    from swim_fast.config import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from swim_fast.training.dry_run.report import dry_run

        report = dry_run(config, args.gpus, args.gpu_memory, args.limit)
        print(report)
        return 0 if report.fits else 1
    from swim_fast.training.run import train

    train(config, resume=args.resume)
    return 0


def _data_check(args) -> int:
    from swim_fast.data.check import check_file
    from swim_fast.jobs import Check

    options = Check(
        file=args.file,
        media=args.media,
        reader=args.reader,
        decode_timeout=args.timeout,
        decode=not args.no_decode,
        workers=args.workers,
    )
    report = check_file(options, _processor(args.model))
    print(report)
    return 1 if report.problems else 0


def _data_show(args) -> int:
    from swim_fast.data.show import show_record
    from swim_fast.options import Decoding, Sampling

    decoding = Decoding(reader=args.reader)
    show_record(args.file, args.index, args.out, _processor(args.model), Sampling(), decoding, media=args.media)
    print(args.out)
    return 0


def _demo(args) -> int:
    from swim_fast.demo.run import run_demo

    if "=" in args.config:  # no file is named: this is the first override
        args.config, args.overrides = "demo", [args.config, *args.overrides]
    run_demo(args.config, args.overrides, train_clips=args.train_clips, heldout_clips=args.heldout_clips)
    return 0


def _describe(args) -> int:
    from swim_fast.evaluation.commands import read_options
    from swim_fast.inference.describe import describe
    from swim_fast.jobs import Describe

    for file in describe(read_options(Describe, args)).files:
        print(file)
    return 0


def _processor(path):
    if path is None:
        return None
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="swim-fast", description=__doc__)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # comes from the deepspeed launcher
    jobs = parser.add_subparsers(required=True, metavar="JOB")

    job = jobs.add_parser("train", help="fine-tune a model as a YAML file says")
    job.add_argument("config", help="YAML file; see configs/")
    job.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.learning_rate=1e-5")
    job.add_argument("--resume", action="store_true", help="go on from the last checkpoint in training.output_dir")
    job.add_argument("--dry-run", action="store_true", help="say what a step will hold, without weights or GPU")
    job.add_argument("--gpus", type=int, help="of the dry run: how many GPUs (default: $WORLD_SIZE or 1)")
    job.add_argument("--gpu-memory", type=float, default=80.0, help="of the dry run: GiB of each GPU")
    job.add_argument("--limit", type=int, default=2000, help="of the dry run: records whose lengths are measured")
    job.set_defaults(run=_train)

    job = jobs.add_parser("demo", help="render clips, train a tiny model with and without the mask loss, draw pictures")
    job.add_argument("config", nargs="?", default="demo")
    job.add_argument("--train-clips", type=int, default=1000)
    job.add_argument("--heldout-clips", type=int, default=60)
    job.add_argument("overrides", nargs="*", metavar="key=value")
    job.set_defaults(run=_demo)

    job = jobs.add_parser(
        "describe",
        argument_default=argparse.SUPPRESS,
        help="ask a checkpoint about a video or image, and draw where it looks",
    )
    job.add_argument("media", help="video, folder of frames, or image")
    job.add_argument("question", help="plain text")
    job.add_argument("--model", required=True, help="checkpoint; options left out are those it was trained with")
    job.add_argument("--max-frames", type=int, help="most frames taken from the video")
    job.add_argument("--fps", type=float, help="frames taken per second of the video, up to --max-frames")
    job.add_argument("--reader", choices=("decord", "torchcodec", "pyav"))
    job.add_argument("--max-new-tokens", type=int, help="longest answer (default: 256)")
    job.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    job.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    job.add_argument("--show", action="append", metavar="NOUN", help="draw its attention; may be repeated")
    job.add_argument("--occurrence", type=int, metavar="N", help="which NOUN of several, from 1 (default: the last)")
    job.add_argument("--layers", type=int, nargs="+", help="layers that are fused (default: those of training)")
    job.add_argument("--out", help="PNG of the attention (default: attention.png)")
    job.add_argument("--video", help="mp4 of the attention over all frames of the video")
    job.set_defaults(run=_describe)

    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("file", help="JSON list or JSONL of VideoRefer / NL-Refer / LLaVA-Video records")
    file.add_argument("--media", help="folder that media paths are relative to (default: the file's own)")
    file.add_argument("--reader", default="decord", choices=("decord", "torchcodec", "pyav"))
    data = jobs.add_parser("data", help="check or show a data file").add_subparsers(required=True, metavar="JOB")
    job = data.add_parser("check", parents=[file], help="read every record of a file and report every problem")
    job.add_argument("--model", help="checkpoint whose processor is to be checked too (tokens, lengths)")
    job.add_argument("--no-decode", action="store_true", help="do not open the videos")
    job.add_argument("--workers", type=int, default=2)
    job.add_argument("--timeout", type=float, default=60.0, help="seconds for one clip")
    job.set_defaults(run=_data_check)
    job = data.add_parser("show", parents=[file], help="draw one record: frames, masks, tagged nouns, tokens")
    job.add_argument("index", type=int, help="record number in the file, counted from 0")
    job.add_argument("--model", required=True, help="checkpoint whose processor and tokenizer are used")
    job.add_argument("--out", default="record.html", help="page, or .png of the frames alone (default: %(default)s)")
    job.set_defaults(run=_data_show)

    add_nl_refer(jobs)
    add_evaluation(jobs)
    return parser


def main(argv=None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if any("=" not in word or word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes positional words from one place only: these came after an option
        args.overrides += rest
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend; anything else shows its traceback
        print(f"swim-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("swim-fast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
