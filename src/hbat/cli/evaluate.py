"""`hbat eval`: measures models one after the other, and shows their scores side by side."""

import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hbat.cli.eval_file import EvalFile
from hbat.cli.output import Output, number_table
from hbat.cli.run_file import parse
from hbat.cli.yaml import read_yaml
from hbat.engines.processes import process_count
from hbat.evaluation.suite import Scores, Suite
from hbat.model.load import is_adapter, load_language_model, load_tokenizer
from hbat.reports.files import COMPLETIONS_FILE, PLOT_FILE, SCORES_FILE
from hbat.reports.matrix import Better
from hbat.reports.plots import draw_models
from hbat.state.files import checksum, write_json
from hbat.state.folder import RunFolder
from hbat.state.lock import locked

_WEIGHTS = ("*.safetensors", "*.bin")
#: Endings of the bounds of a metric's interval.
_BOUNDS = ("_low", "_high")


def evaluate(models: Sequence[str], config: EvalFile) -> Callable[[], None]:
    """Measure models and write `evaluation.json` and `evaluation.png`, beside those of the same evaluation before.

    Args:
        models: Names on the Hub, folders of models, adapters or runs, or run files.
        config: What is measured.

    Returns:
        What prints the scores.

    Raises:
        ValueError: If a model cannot be loaded or measured.
        RunStateError: If another process measures in the folder.
    """
    if process_count() > 1:
        raise ValueError("`hbat eval` measures in one process. Start it without `torchrun` or `accelerate launch`.")
    sources, folder = [_source(model) for model in models], Path(config.output_dir)
    labels = _labels(sources)
    if RunFolder(folder).holds_run():
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds a run, with scores of its own. Name another folder."
        )
    suite, plain = Suite(config), json.loads(json.dumps(dataclasses.asdict(config), default=str))
    with locked(folder):
        found, data, columns = _before(folder, suite)
        work = ", ".join(_sizes(suite.counts)) or "tasks"
        for number, (label, source) in enumerate(zip(labels, sources, strict=True), start=1):
            print(f"{number} of {len(labels)}: {source} ({work})", file=sys.stderr)
            found[label] = found.get(label, {}) | _measured(source, suite, config, folder / label)
            columns |= {name: suite.headline(name, own) for name, own in found[label].items() if name not in columns}
            values = {"models": found, "counts": suite.counts, "config": plain}
            write_json(folder / SCORES_FILE, values | {"data": data, "columns": columns})
        draw_models(found, columns, folder / PLOT_FILE)
    return partial(print_evaluation, found, columns, suite.counts, folder)


def _sizes(counts: Mapping[str, int]) -> list[str]:
    return [f"{count} {'prompts' if name == 'completions' else name}" for name, count in counts.items()]


def _before(folder: Path, suite: Suite) -> tuple[dict[str, Scores], dict[str, str], dict[str, tuple[str, Better]]]:
    """Scores in the folder, but for those of other rows or settings; what all are made of; their columns."""
    try:
        values = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
        data, models, columns = (dict(values[key]) for key in ("data", "models", "columns"))
    except (OSError, ValueError, KeyError, TypeError):
        return {}, suite.data, {}
    other = {name for name, own in suite.data.items() if data.get(name) != own}
    kept = {
        label: {name: own for name, own in scores.items() if name.partition("@")[0] not in other}
        for label, scores in models.items()
    }
    found = {label: scores for label, scores in kept.items() if scores}
    shown = {name for scores in found.values() for name in scores}
    known = {name: (metric, better) for name, (metric, better) in columns.items() if name in shown}
    return found, data | suite.data, known


def _source(given: str) -> str:
    """The name or folder of a model that the user names, also by its run."""
    path = Path(given).expanduser()
    if path.suffix in {".yaml", ".yml"}:
        if "model_name_or_path" not in read_yaml(path):
            raise ValueError(f"{given} is no run file. What is measured belongs after `--config`.")
        path = Path(parse(path).config.output_dir)
    elif not path.is_dir():
        return given
    if not is_adapter(path) and not (path / "config.json").is_file():
        raise ValueError(
            f"The folder {str(path)!r} holds neither a model nor an adapter. A run has one once it is finished (`hbat "
            "train --resume`)."
        )
    return str(path)


def _labels(sources: Sequence[str]) -> list[str]:
    """Names for models: the last part of each path, or as much of it as tells them apart."""
    paths = [Path(source).resolve() if Path(source).is_dir() else Path(source) for source in sources]
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        labels = ["-".join(path.parts[-parts:]).strip("/.-") or "model" for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"A model is named twice: {', '.join(sources)}.")


def _measured(source: str, suite: Suite, config: EvalFile, folder: Path) -> Scores:
    try:
        model = load_language_model(source, {"dtype": "auto", **(config.model_init_kwargs or {})})
        tokenizer = load_tokenizer(None, model, config, origin=source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source!r} cannot be loaded as a language model: {error}") from error
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model.to(PartialState().default_device)
    identity = [_identity(source, model), repr(config.model_init_kwargs)]
    scores = suite.measure(model.eval(), tokenizer, folder, identity=identity)
    del model
    gc.collect()  # a model's modules refer to one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores


def _identity(source: str, model: Any) -> list[Any]:
    """What tells a model from others, with the base of an adapter: checksums of weights, or commits on the Hub."""
    found: list[Any] = []
    for name in dict.fromkeys([source, str(model.config._name_or_path)]):  # noqa: SLF001 - the base, no public name
        files = sorted(file for pattern in _WEIGHTS for file in Path(name).glob(pattern) if file.is_file())
        commit = getattr(model.config, "_commit_hash", None)
        found.append({file.name: checksum(file) for file in files} or [name, commit])
    return found


def print_evaluation(
    found: Mapping[str, Scores],
    columns: Mapping[str, tuple[str, Better]],
    counts: Mapping[str, int],
    folder: Path,
) -> None:
    """Print a table of all scores, a column for each model, and the paths of the results."""
    output, table = Output(), number_table("", *found)
    for name, (main, better) in columns.items():
        metrics = dict.fromkeys(metric for scores in found.values() for metric in scores.get(name, {}))
        for metric in sorted(metrics, key=lambda metric: metric != main):
            if metric.endswith(_BOUNDS):
                continue
            direction = f" ({better} is better)" if metric == main else ""
            cells = [_cell(scores.get(name, {}), metric) for scores in found.values()]
            table.add_row(f"{name} {metric}{direction}", *cells, style=None if metric == main else "dim")
        table.add_section()
    output.table(table, ", ".join([*_sizes(counts), "95 % intervals"]))
    output.print(f"Scores:      {(folder / SCORES_FILE).absolute()}")
    if (folder / PLOT_FILE).is_file():
        output.print(f"Plot:        {(folder / PLOT_FILE).absolute()}")
    if "completions" in counts:
        output.print(f"Completions: {folder.absolute()}/MODEL/{COMPLETIONS_FILE}")


def _cell(scores: Mapping[str, float], metric: str) -> str:
    value = scores.get(metric)
    if value is None:
        return ""
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4g}"
    low, high = (scores.get(f"{metric}{bound}") for bound in _BOUNDS)
    return text if low is None or high is None else f"{text} [{low:.3g}, {high:.3g}]"
