"""Model card of a finished run, saved beside its weights."""

import yaml

from swim_fast.config import RunConfig
from swim_fast.errors import name_count

_CARD = """---
{header}---

# {name}, trained with swim_fast

A plain checkpoint of `{base}`, fine-tuned for {steps} steps with {how}. It takes plain text and video, without tags.

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # where this file is
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)

content = [{{"type": "video", "path": "clip.mp4"}}, {{"type": "text", "text": "What is the dog on the left doing?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```
{positions}{differs}
## Training data

| file | passes per epoch | records |
|---|---:|---:|
{sources}
{skipped}
## Metrics

| | |
|---|---:|
{metrics}

## Configuration

```yaml
{config}```
"""

_POSITIONS = """
It was trained with position ids by the rule of pretraining. transformers from 5.3 on numbers text behind long videos
otherwise, unless `swim_fast.modeling.positions.set_position_rule(model, "pretraining")` is called on the model.
"""

_DIFFERS = """
Give it the same input as in training: {options}.
"""


def render_model_card(config: RunConfig, steps: int, metrics: dict[str, float]) -> str:
    """Return Markdown on the model, its training data and configuration, its metrics and its use.

    Args:
        config: the run's effective configuration.
        steps: optimizer steps done.
        metrics: of the run and of its last evaluation; `skipped_samples`, where there were any, has a sentence.
    """
    base, loss = config.model.path, config.attention_loss
    header = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["video", "swim"],
    }
    how = "text loss alone"
    if loss is not None and loss.mask_weight > 0:
        how = (
            "SWIM's attention loss ([arXiv 2605.18018](https://arxiv.org/abs/2605.18018); "
            f"weight {loss.mask_weight:g}, layers {', '.join(map(str, loss.layers or []))}) "
            f"and text loss (weight {loss.text_weight:g})"
        )
    if config.model.lora:
        how += (
            f", through adapters of rank {config.model.lora.rank} (alone in `adapter/`, here merged into the weights)"
        )
    differs, prompt = [], config.data.system_prompt
    if prompt is not None:
        differs.append(f"the system turn {prompt!r}" if prompt else "no system turn")
    if config.data.seconds_per_patch == "one":
        differs.append("`second_per_grid_ts` 1 for every video")
    sources = [f"| {source.path} | {source.weight:g} | {source.limit or 'all'} |" for source in config.data.train]
    skipped = metrics.get("skipped_samples", 0)
    values = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, (int, float))]
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        name=base.rstrip("/").rpartition("/")[2],
        base=base,
        steps=steps,
        how=how,
        positions=_POSITIONS if config.model.position_ids == "pretraining" else "",
        differs=_DIFFERS.format(options=" and ".join(differs)) if differs else "",
        sources="\n".join(sources),
        skipped=f"\nLeft out of training for their problems: {name_count(skipped, 'sample')}.\n" if skipped else "",
        metrics="\n".join(values),
        config=config.as_yaml(),
    )
