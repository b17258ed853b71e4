"""Model card of a finished run, saved beside its weights."""

import yaml

from swim_fast.config import RunConfig

_LOAD = """from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # where this file is
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)"""

_ASK = """
content = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What is the dog on the left doing?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])"""


def render_model_card(config: RunConfig, steps: int, metrics: dict[str, float]) -> str:
    """Return Markdown on the model, its training data and configuration, its metrics and its use.

    Args:
        config: the run's effective configuration.
        steps: optimizer steps done.
        metrics: of the run and of its last evaluation.
    """
    base = config.model.path
    header = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["video", "swim"],
    }
    loss = config.attention_loss
    how = "text loss alone"
    if loss is not None and loss.mask_weight > 0:
        how = (
            "SWIM's attention loss ([arXiv 2605.18018](https://arxiv.org/abs/2605.18018); "
            f"weight {loss.mask_weight:g}, layers {', '.join(map(str, loss.layers or []))}) "
            f"and text loss (weight {loss.text_weight:g})"
        )
    sources = [f"| {source.path} | {source.weight:g} | {source.limit or 'all'} |" for source in config.data.train]
    values = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, (int, float))]
    if config.model.lora:
        how += (
            f", through adapters of rank {config.model.lora.rank} (alone in `adapter/`, here merged into the weights)"
        )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {base.rstrip('/').rpartition('/')[2]}, trained with swim_fast",
            "",
            f"A plain checkpoint of `{base}`, fine-tuned for {steps} steps with {how}. It takes plain text and video, "
            "without tags.",
            "",
            "## Use",
            "",
            "```python",
            _LOAD + "\n" + _ASK,
            "```",
            "",
            "## Training data",
            "",
            "| file | passes per epoch | records |",
            "|---|---:|---:|",
            *sources,
            "",
            "## Metrics",
            "",
            "| | |",
            "|---|---:|",
            *values,
            "",
            "## Configuration",
            "",
            "```yaml",
            config.as_yaml().strip(),
            "```",
            "",
        ]
    )
