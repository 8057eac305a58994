"""The model card: what was trained, how, and what came out."""

import json
import logging
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from hbat.config.ewc import EWCConfig
from hbat.config.hbat import HBATConfig
from hbat.reports.files import PLOT_FILE
from hbat.reports.matrix import ForgettingMatrix, directions, markdown_table
from hbat.state.files import write_bytes

logger = logging.getLogger(__name__)

_PACKAGES = ("hbat-trl", "trl", "transformers", "torch", "datasets")

_TAG = "hbat"
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

Trained from `{{ origin }}` by hybrid alignment training ([HBAT](https://arxiv.org/abs/2406.15178)): the objectives
{{ objectives }} {{ order }}.

{% for line in trained %}
* {{ line }}
{% endfor %}
* elastic weight consolidation: `{{ ewc }}`
* optimizer moments between stages: `{{ config.optimizer_state }}`
* learning-rate schedule: `{{ config.lr_schedule }}`; end_weight: `{{ end_weight }}`
{% if scores %}
## Scores after each stage

{{ better }}. The reference policy of a preference score is the model at the start of the {% if config.continue_from
%}first of the runs that continue each other{% else %}run{% endif %}.
{%- if moved %} The last row is the run's own end; this model is another point of its last stage,
start + {{ end_weight }} * (end - start).{% endif %}

{{ scores }}
{% if plot %}

![Scores after every stage]({{ plot }})
{% endif %}
{% endif %}

## Use

```python
from transformers import AutoTokenizer
from {{ "peft" if adapter else "transformers" }} import {{ loader }}

model = {{ loader }}.from_pretrained("{{ name }}")  # folder or repository
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
```

Licences of the base model and of the data hold for this model too.

## Versions

{{ versions }}

## Citation

```bibtex
@inproceedings{wang2024hybrid,
  title = {Hybrid Alignment Training for Large Language Models},
  author = {Wang, Chenglong and Zhou, Hang and Chang, Kaiyan and Li, Bei and Mu, Yongyu and Xiao, Tong and
            Liu, Tongran and Zhu, Jingbo},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2024},
  year = {2024}
}
```
"""


def write_model_card(
    folder: Path,
    config: HBATConfig,
    model: Any,
    matrix: ForgettingMatrix,
    end_weight: float | None = None,
    trained: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> None:
    """Write the model card, `README.md`, unless there is a file of that name that no trainer has written.

    Args:
        folder: Folder of the model.
        config: The run's configuration.
        model: The model.
        matrix: Its scores.
        end_weight: The point of the last stage that the model was moved to after the run, if it was.
        trained: A line for each objective: what it was trained on, and how.
        sources: Names of the data that it was trained on; the Hub gets those of its own.
    """
    file = folder / "README.md"
    if file.exists() and not _is_card(file):
        logger.warning("%s was not written by a trainer, so it was kept. Move it to get a model card.", file)
        return
    base, name = getattr(model.config, "_name_or_path", ""), folder.resolve().name
    on_hub, is_adapter = _is_hub_name(base), hasattr(model, "peft_config")
    better, results = directions(matrix), [] if end_weight is not None else _results(matrix)
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base if on_hub else None,
            license=_licence(base),
            datasets=[source for source in sources if _is_hub_name(source) and not Path(source).suffix] or None,
            library_name="peft" if is_adapter else "transformers",
            tags=[_TAG, "trl", *config.objective_names, *(["peft"] if is_adapter else [])],
            model_name=name if results else None,
            eval_results=results or None,
        ),
        template_str=_TEMPLATE,
        name=name,
        trained=trained,
        adapter=is_adapter,
        loader="AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        plot=PLOT_FILE if (folder / PLOT_FILE).is_file() else "",
        versions=", ".join(f"{package} {version(package)}" for package in _PACKAGES),
        origin=(base if on_hub else re.split(r"[/\\]", base.rstrip("/\\"))[-1]) or "a model given in memory",
        objectives=", ".join(config.objective_names),
        config=config,
        order="follow each other" if config.num_rounds == 1 else f"alternate over {config.num_rounds} rounds",
        end_weight=config.end_weight if end_weight is None else end_weight,
        moved=end_weight is not None,
        ewc="none" if config.ewc is None else json.dumps(_own(config.ewc)),
        better=better[:1].upper() + better[1:],
        scores=markdown_table(matrix) if matrix.scored else "",
    )
    write_bytes(file, f"{card}\n".encode())


def _is_card(file: Path) -> bool:
    """Whether a trainer of this library or of transformers has written a README.md."""
    try:
        tags = (metadata_load(file) or {}).get("tags")
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(tags, list) and any(tag in (_TAG, "generated_from_trainer") for tag in tags)


def _own(config: EWCConfig) -> dict[str, Any]:
    # What says how the run was held back, and what is not a default.
    values = vars(config).items()
    return {key: value for key, value in values if key in ("source", "strength") or value != getattr(EWCConfig, key)}


def _results(matrix: ForgettingMatrix) -> list[EvalResult]:
    # Of the run's end, in the form of the Hub.
    scores = matrix.end
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_config=name,  # results are grouped by it
            dataset_name="rows of `evaluation`" if name in matrix.measured else f"evaluation rows of {name}",
            metric_type=metric,
            metric_value=round(scores[name][metric], 4),
        )
        for name, metric in matrix.headline.items()
        if metric in scores.get(name, {})
    ]


def _licence(base: str) -> str | None:
    """The licence that the base model's own card names, if the card is on this machine."""
    found = try_to_load_from_cache(base, "README.md") if _is_hub_name(base) else Path(base, "README.md")
    try:
        licence = ModelCard.load(Path(str(found))).data.license if found else None
    except (OSError, ValueError, yaml.YAMLError):  # there is none, or not in this form
        return None
    return licence if isinstance(licence, str) else None


def _is_hub_name(name: str) -> bool:
    # The Hub refuses a card that names a folder as base model, and the path of a folder is private.
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).exists()
