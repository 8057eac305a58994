"""`hbat eval`: measures models one after the other, and shows their scores side by side."""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from hbat.cli.eval_file import EvalFile
from hbat.cli.run_file import parse
from hbat.evaluation.suite import Scores, Suite, headline
from hbat.model.load import is_adapter, load_language_model, load_tokenizer
from hbat.reports.files import EVAL_FILE, EVAL_PLOT_FILE
from hbat.reports.plots import draw_models
from hbat.state.files import checksum, write_json
from hbat.state.folder import RunFolder

_WEIGHTS = ("*.safetensors", "*.bin")
_COUNTED = {"completions": "prompts"}
#: Endings of a metric's interval and standard error.
_BOUNDS = ("_low", "_high")


def evaluate(models: Sequence[str], config: EvalFile) -> dict[str, Scores]:
    """Measure models and write `evaluation.json` and `evaluation.png`; those that are measured already are read.

    Args:
        models: Names on the Hub, folders of models, adapters or runs, or run files.
        config: What is measured.

    Returns:
        Scores by model.

    Raises:
        ValueError: If a model cannot be loaded or measured.
    """
    sources = [_source(model) for model in models]
    folder, suite, found = Path(config.output_dir), Suite(config), dict[str, Scores]()
    for label, source in zip(_labels(sources), sources, strict=True):
        found[label] = _measured(source, suite, config, folder / label)
        counts = suite.counts
        write_json(folder / EVAL_FILE, {"models": found, "counts": counts})
    draw_models(
        found,
        {name: headline(name, scores) for one in found.values() for name, scores in one.items()},
        folder / EVAL_PLOT_FILE,
    )
    return found


def _source(given: str) -> str:
    """The name or folder of a model that the user names, also by its run."""
    path = Path(given).expanduser()
    if path.suffix in {".yaml", ".yml"}:
        path = Path(parse(path).config.output_dir)
    elif not path.is_dir():
        return given
    if RunFolder(path).holds_run() and not is_adapter(path) and not (path / "config.json").is_file():
        raise ValueError(f"The run in {str(path)!r} has saved no model yet. Finish it with `hbat train --resume`.")
    return str(path)


def _labels(sources: Sequence[str]) -> list[str]:
    """Names for models: the last part of each path, or as much of it as tells them apart."""
    for parts in range(1, 1 + max(len(Path(source).parts) for source in sources)):
        labels = ["-".join(Path(source).parts[-parts:]) for source in sources]
        if len(set(labels)) == len(labels):
            return [label.strip("/.-") or "model" for label in labels]
    raise ValueError(f"A model is named twice: {', '.join(sources)}.")


def _measured(source: str, suite: Suite, config: EvalFile, folder: Path) -> Scores:
    try:
        model = load_language_model(source, {"dtype": "auto", **(config.model_init_kwargs or {})})
        tokenizer = load_tokenizer(None, model, origin=source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source!r} cannot be loaded as a language model: {error}") from error
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model.to(PartialState().default_device)
    folder.mkdir(parents=True, exist_ok=True)
    scores = suite.measure(model.eval(), tokenizer, folder, identity=_identity(source, model))
    del model
    gc.collect()  # a model's modules refer to one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores


def _identity(source: str, model: Any) -> dict[str, Any]:
    """What tells a model from others: the checksums of its weights, or its commit on the Hub."""
    files = sorted(file for pattern in _WEIGHTS for file in Path(source).glob(pattern) if file.is_file())
    if files:
        return {file.name: checksum(file) for file in files}
    return {"name": source, "commit": getattr(model.config, "_commit_hash", None)}


def print_evaluation(found: Mapping[str, Scores], config: EvalFile) -> None:
    """Print a table of all scores, a column for each model, and the paths of the results."""
    console, folder = Console(soft_wrap=True), Path(config.output_dir).absolute()
    counts = json.loads((folder / EVAL_FILE).read_text(encoding="utf-8"))["counts"]
    rows = [f"{count} {_COUNTED.get(name, name)}" for name, count in counts.items()]
    table = Table(title=", ".join([*rows, "95 % intervals"]), title_justify="left")
    table.add_column("")
    for label in found:
        table.add_column(label, justify="right")
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    for name in names:
        metrics = {metric: value for scores in found.values() for metric, value in scores.get(name, {}).items()}
        main, better = headline(name, metrics)
        for metric in sorted(metrics, key=lambda metric: metric != main):
            if metric.endswith(_BOUNDS):
                continue
            arrow = {"higher": " (higher is better)", "lower": " (lower is better)"}[better] if metric == main else ""
            cells = [_cell(scores.get(name, {}), metric) for scores in found.values()]
            table.add_row(f"{name} {metric}{arrow}", *cells, style=None if metric == main else "dim")
        table.add_section()
    console.print(table)
    console.print(f"Scores:      {folder / EVAL_FILE}", highlight=False)
    if (folder / EVAL_PLOT_FILE).is_file():
        console.print(f"Plot:        {folder / EVAL_PLOT_FILE}", highlight=False)
    if config.prompts is not None:
        console.print(f"Completions: {folder}/MODEL/completions.jsonl", highlight=False)


def _cell(scores: Mapping[str, float], metric: str) -> str:
    value = scores.get(metric)
    if value is None:
        return ""
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4g}"
    low, high = (scores.get(f"{metric}{bound}") for bound in _BOUNDS)
    return text if low is None or high is None else f"{text} [{low:.3g}, {high:.3g}]"
