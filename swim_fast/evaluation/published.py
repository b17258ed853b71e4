"""Published numbers of VideoRefer-Bench, with their conditions as far as their sources state them.

Numbers: tables of "VideoRefer Suite" (arXiv 2501.00599, tables 1, 2 and 5) and of `VideoRefer/benchmark/README.md` in
https://github.com/alibaba-damo-academy/PixelRefer. Conditions: `evaluation_general_mllms.md` beside it (models
that take no masks: targets drawn into the clip by set-of-mark, 16 frames), the evaluation scripts there, and table 5.
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

_DRAWN = "target drawn into the clip, 16 frames"
_MASK = "mask as input"


@dataclass(frozen=True)
class Published:
    """One published row: the numbers in the order of their columns, then their mean as published."""

    model: str
    values: tuple[float, ...]
    average: float
    conditions: str


# Accuracy in per cent by QUESTION_TYPES.
QUESTIONS = (
    Published("GPT-4o", (62.3, 74.5, 66.0, 88.0, 73.7), 71.3, _DRAWN),
    Published("Qwen2-VL-7B", (62.0, 69.6, 54.9, 87.3, 74.6), 66.0, _DRAWN),
    Published("VideoRefer-7B", (75.4, 68.6, 59.3, 89.4, 78.1), 71.9, f"{_MASK}, of a single frame"),
    Published(
        "VideoRefer-VideoLLaMA3-7B",
        (88.1, 77.7, 70.2, 88.8, 79.8),
        80.1,
        f"{_MASK}, of a single frame; 1 frame per second",
    ),
)

# Scores from 0 to 5: subject correspondence, appearance, temporal description, hallucination detection.
_JUDGE = "judge GPT-4o"
DESCRIPTIONS = (
    Published("GPT-4o", (3.34, 2.96, 3.01, 2.50), 2.95, f"single; {_DRAWN}; {_JUDGE}"),
    Published("GPT-4o", (4.15, 3.31, 3.11, 2.43), 3.25, f"multi; {_DRAWN}; {_JUDGE}"),
    Published("Qwen2-VL-7B", (2.97, 2.24, 2.03, 2.31), 2.39, f"single; {_DRAWN}; {_JUDGE}"),
    Published("Qwen2-VL-7B", (3.30, 2.54, 2.22, 2.12), 2.55, f"multi; {_DRAWN}; {_JUDGE}"),
    Published("VideoRefer-7B", (4.41, 3.27, 3.03, 2.97), 3.42, f"single; {_MASK}; {_JUDGE}"),
    Published("VideoRefer-7B", (4.44, 3.27, 3.10, 3.04), 3.46, f"multi; {_MASK}; {_JUDGE}"),
    Published("VideoRefer-VideoLLaMA3-7B", (4.63, 3.59, 3.38, 3.29), 3.72, f"single; {_MASK}; {_JUDGE}"),
)

QUESTIONS_NOTE = """\
Published rows: VideoRefer Suite (arXiv 2501.00599) and its repository. Options, the prompt's ending and the rule that
reads the letter are the published ones, so that answers to all 1,000 questions can be set beside theirs. How the object
is pointed out is not the same: the published models saw its mask or outline, here the question names it in words.
Frames and resolution differ as well. What training has done shows beside the base model, run by the same command."""

DESCRIPTIONS_NOTE = """\
Published rows: VideoRefer Suite (arXiv 2501.00599) and its repository; single and multi say in how many frames the
object was marked. They were judged by GPT-4o, in the published script at temperature 0.7, with another prompt than the
one here. Scores compare only among runs with the same judge, judge's prompt, temperature and frame mode: to compare,
judge the base model's descriptions by the same command."""
