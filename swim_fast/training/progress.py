"""Lines that a run prints: one for each log and evaluation, and at the end the next commands."""

import shlex
import sys
import time
from collections.abc import Iterable

from transformers import ProgressCallback

from swim_fast.config import RunConfig
from swim_fast.errors import name_count
from swim_fast.options import METRICS, Source

_LOSSES = ("text", "mask", "image", "system")
_OWN = {"loss", *(f"{name}_loss" for name in _LOSSES), "learning_rate", "tokens_per_second", "epoch", *METRICS}
_SHARES = {"pointing_accuracy": "pointing {:.0%}", "mass_in_mask": "mass in mask {:.2f}", "soft_iou": "soft IoU {:.2f}"}


class ProgressLines(ProgressCallback):
    """Prints logs as lines, in place of transformers' dictionaries; keeps its bar where a terminal shows it."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin = time.perf_counter(), state.global_step
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        line = format_log(logs, state.global_step, state.max_steps, self._time_left(state))
        (print if self.training_bar is None else self.training_bar.write)(line)
        sys.stdout.flush()

    def _time_left(self, state) -> float | None:
        begin, first = getattr(self, "_begin", (0.0, state.global_step))
        done = state.global_step - first
        return (time.perf_counter() - begin) / done * (state.max_steps - state.global_step) if done > 0 else None


def format_log(logs: dict, step: int, steps: int, seconds_left: float | None = None) -> str:
    """Return the line of a log of transformers' trainer: of training, of an evaluation, or of the whole run."""
    if "train_runtime" in logs:
        return f"trained to step {step} in {format_seconds(logs['train_runtime'])}"
    at = f"step {step:>{len(str(steps))}}/{steps}"
    runtime = next((key for key in logs if key.startswith("eval_") and key.endswith("_runtime")), None)
    if runtime is not None:
        prefix = runtime.removesuffix("runtime")
        scores = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
        return "  ".join([at, f"evaluation {prefix[5:-1]}:", *_parts(scores, METRICS)])
    if "learning_rate" not in logs:
        return "  ".join([at, *(f"{key} {value}" for key, value in logs.items() if key != "epoch")])
    parts = [at, *_parts(logs, METRICS[:1]), f"lr {logs['learning_rate']:.1e}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if logs.get("skipped"):
        parts.append(f"{name_count(int(logs['skipped']), 'sample')} skipped")
    if seconds_left is not None:
        parts.append(f"{format_seconds(seconds_left)} left")
    return "  ".join(parts)


def _parts(values: dict[str, float], metrics: Iterable[str]) -> list[str]:
    losses = [f"{name} {values[f'{name}_loss']:.3f}" for name in _LOSSES if f"{name}_loss" in values]
    parts = [f"loss {values['loss']:.3f}" + f" ({', '.join(losses)})" * bool(losses)] if "loss" in values else losses
    return parts + [_SHARES[name].format(values[name]) for name in metrics if name in values]


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 42 s, 3 min 20 s, 5 h 7 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_ending(config: RunConfig, metrics: dict[str, float]) -> str:
    """Return what the end of a run says: where the model is, what it scored, and commands to go on with."""
    output = str(config.output)
    lines = ["", f"model: {output} (a plain Hugging Face checkpoint; README.md beside it is its model card)"]
    for name in config.data.eval:
        prefix = f"eval_{name}_"
        scores = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        lines.append("  ".join([f"score on {name}:", *_parts(scores, METRICS)]))
    if metrics.get("skipped_samples"):
        left_out = name_count(int(metrics["skipped_samples"]), "sample")
        lines.append(f"left out: {left_out}; see {output}/skipped-rank0.jsonl and those of other ranks")
    lines += ["", "next:"]
    sources = [*config.data.eval.values(), *config.data.train]
    commands = [next(filter(None, map(look_at, sources)), ["describe", "CLIP.mp4", "What is in the video?"])]
    commands[0] += ["--model", output]
    tagged = [source for source in config.data.eval.values() if source.use_tags]
    if tagged:
        media = ["--media", tagged[0].media] if tagged[0].media else []
        commands.append(["evaluate", "grounding", output, tagged[0].path, *media, "--out", f"{output}/grounding"])
    commands.append(["report", output])
    return "\n".join([*lines, *(f"  swim-fast {shlex.join(command)}" for command in commands)])


def look_at(source: Source) -> list[str] | None:
    """Return a command that shows the attention of a source's first tagged noun; None without one among ten records."""
    from swim_fast.data.sample.conversation import PLACEHOLDER
    from swim_fast.data.source.errors import DataError
    from swim_fast.data.source.records import RecordFile
    from swim_fast.data.source.tags import strip_tags

    records = RecordFile.from_source(source)
    for index in range(min(len(records), 10)):
        try:
            record = records[index]
        except DataError:  # told in the run
            continue
        for turn in record.turns:
            text, nouns = strip_tags(turn.text)
            if turn.role == "user" and nouns and record.media is not None:
                (start, end), *_ = nouns
                question = " ".join(PLACEHOLDER.sub(" ", text).split())
                return ["describe", str(record.media), question, "--show", text[start:end]]
    return None
