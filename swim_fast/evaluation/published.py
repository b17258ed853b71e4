"""Published numbers of VideoRefer-Bench and of attention maps, with their conditions as far as their sources state
them.

Sources: SWIM (arXiv 2605.18018) for the rows of text prompts, for averages without columns, and for `ATTENTION`;
"VideoRefer Suite" (arXiv 2501.00599, tables 1, 2 and 5) and `VideoRefer/benchmark/README.md` in
https://github.com/alibaba-damo-academy/PixelRefer for the others. Conditions of those: `evaluation_general_mllms.md`
beside it (models that take no masks: targets drawn into the clip by set-of-mark, 16 frames), the evaluation scripts
there, and table 5.
"""

from __future__ import annotations

from dataclasses import dataclass

QUESTION_TYPES = (
    "Basic Questions",
    "Sequential Questions",
    "Relationship Questions",
    "Reasoning Questions",
    "Future Predictions",
)

_WORDS = "object named in words"
_DRAWN = "target drawn into the clip, 16 frames"
_MASK = "mask as input"
_LISTED = "as listed by SWIM"


@dataclass(frozen=True)
class Published:
    """One published row.

    Attributes:
        model: its name.
        prompt: how the object is pointed out: "text" (the fair comparison), "drawn" into the frames, "mask" as an
            input of its own, or "?" where the source does not say.
        values: numbers in the order of their columns; empty where only the average is known.
        average: mean as published, over questions or scores and not over columns.
        conditions: what else is known.
    """

    model: str
    prompt: str
    values: tuple[float, ...]
    average: float
    conditions: str


# Accuracy in per cent by QUESTION_TYPES.
QUESTIONS = (
    Published("SWIM-7B", "text", (83.8, 75.0, 66.7, 93.7, 80.7), 78.3, _WORDS),
    Published("Qwen2.5-VL-7B (its base)", "text", (78.0, 69.7, 58.2, 79.9, 73.2), 71.8, _WORDS),
    Published("Qwen2.5-Omni-7B", "text", (), 68.2, _WORDS),
    Published("LLaVA-OV-7B", "?", (), 67.4, _LISTED),
    Published("InternVL2-26B", "drawn", (58.5, 63.5, 53.4, 88.0, 78.9), 65.0, _DRAWN),
    Published("GPT-4o", "drawn", (62.3, 74.5, 66.0, 88.0, 73.7), 71.3, _DRAWN),
    Published("Qwen2-VL-7B", "drawn", (62.0, 69.6, 54.9, 87.3, 74.6), 66.0, _DRAWN),
    Published("VideoRefer-7B", "mask", (75.4, 68.6, 59.3, 89.4, 78.1), 71.9, f"{_MASK}, of a single frame"),
    Published(
        "VideoRefer-VideoLLaMA3-7B",
        "mask",
        (88.1, 77.7, 70.2, 88.8, 79.8),
        80.1,
        f"{_MASK}, of a single frame; 1 frame per second",
    ),
)

# Scores from 0 to 5: subject correspondence, appearance, temporal description, hallucination detection.
_JUDGE = "judge GPT-4o"
DESCRIPTIONS = (
    Published("SWIM-7B", "text", (4.92, 3.85, 3.43, 2.96), 3.78, f"{_WORDS}; {_JUDGE}"),
    Published("Qwen2.5-VL-7B (its base)", "text", (4.33, 3.19, 2.88, 2.58), 3.24, f"{_WORDS}; {_JUDGE}"),
    Published("Qwen2.5-Omni-7B", "text", (), 2.76, f"{_WORDS}; {_JUDGE}"),
    Published("LLaVA-OV-7B", "?", (), 2.48, _LISTED),
    Published("InternVL2-26B", "drawn", (3.55, 2.99, 2.57, 2.25), 2.84, f"single; {_DRAWN}; {_JUDGE}"),
    Published("InternVL2-26B", "drawn", (4.08, 3.35, 3.08, 2.28), 3.20, f"multi; {_DRAWN}; {_JUDGE}"),
    Published("GPT-4o", "drawn", (3.34, 2.96, 3.01, 2.50), 2.95, f"single; {_DRAWN}; {_JUDGE}"),
    Published("GPT-4o", "drawn", (4.15, 3.31, 3.11, 2.43), 3.25, f"multi; {_DRAWN}; {_JUDGE}"),
    Published("Qwen2-VL-7B", "drawn", (2.97, 2.24, 2.03, 2.31), 2.39, f"single; {_DRAWN}; {_JUDGE}"),
    Published("Qwen2-VL-7B", "drawn", (3.30, 2.54, 2.22, 2.12), 2.55, f"multi; {_DRAWN}; {_JUDGE}"),
    Published("VideoRefer-7B", "mask", (4.41, 3.27, 3.03, 2.97), 3.42, f"single; {_MASK}; {_JUDGE}"),
    Published("VideoRefer-7B", "mask", (4.44, 3.27, 3.10, 3.04), 3.46, f"multi; {_MASK}; {_JUDGE}"),
    Published("VideoRefer-VideoLLaMA3-7B", "mask", (4.63, 3.59, 3.38, 3.29), 3.72, f"single; {_MASK}; {_JUDGE}"),
    Published("DAM-8B", "mask", (), 3.68, f"{_MASK}; {_LISTED}"),
)

# Model -> metrics of its attention maps, by the names of `RANKING_METRICS`, as far as they are known.
ATTENTION = {
    "SWIM-7B": {
        "gamepoint_top_1pct": 0.392,
        "gamepoint_top_5pct": 0.348,
        "gamepoint_top_10pct": 0.317,
        "average_precision": 0.30,
        "auc": 0.67,
        "nss": 0.50,
        "precision_at_75": 0.39,
    },
    "Qwen2.5-VL-7B (its base)": {
        "gamepoint_top_1pct": 0.329,
        "gamepoint_top_5pct": 0.293,
        "gamepoint_top_10pct": 0.270,
        "average_precision": 0.26,
        "auc": 0.62,
        "nss": 0.39,
        "precision_at_75": 0.28,
    },
}

QUESTIONS_NOTE = """\
Published rows: text prompts from SWIM (arXiv 2605.18018), the others from VideoRefer Suite (arXiv 2501.00599) and its
repository. Rows with the prompt "text" name the object in words, as the run above does: they are the fair comparison;
the others saw its mask or outline. Options, the prompt's ending and the rule that reads the letter are the published
ones, so that answers to all 1,000 questions can be set beside theirs. Frames and resolution differ. What training has
done shows beside the base model, run by the same command."""

DESCRIPTIONS_NOTE = """\
Published rows: text prompts from SWIM (arXiv 2605.18018), the others from VideoRefer Suite (arXiv 2501.00599) and its
repository. Rows with the prompt "text" name the object in words: they are the fair comparison; single and multi say in
how many frames the object was marked. All were judged by GPT-4o, those of VideoRefer in its script at temperature 0.7,
with another prompt than the one here. Scores compare only among runs with the same judge, judge's prompt, temperature
and frame mode: to compare, judge the base model's descriptions by the same command."""

ATTENTION_NOTE = """\
Published rows: SWIM (arXiv 2605.18018), which names these metrics and prints no formula. Its analysis script takes each
frame as an image by itself, averages over the tokens of a video and then over videos, and enlarges maps to the nearest
pixel: the rows show the size of the effect and are no yardstick. The comparison is the base model, run by the same
command."""
