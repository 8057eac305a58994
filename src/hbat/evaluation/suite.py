"""Everything that an evaluation measures of one model, with its files in one folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hbat.config.evaluation import EvalConfig
from hbat.evaluation.completions import CompletionFile, Row, read_rows
from hbat.evaluation.judges import Pair, make_judge
from hbat.evaluation.likelihood import of_pairs, of_texts
from hbat.evaluation.metrics import of_completions
from hbat.evaluation.rows import load_asked, load_pairs, load_texts
from hbat.evaluation.tasks import Tasks, headline_of
from hbat.reports.matrix import Better
from hbat.state.files import digest, write_json

COMPLETIONS = "completions.jsonl"
JUDGMENTS = "judgments.jsonl"
SETTINGS = "settings.json"
#: The metric by which each measurement is known, and which values of it are better.
HEADLINES: Mapping[str, tuple[str, Better]] = {
    "completions": ("ended", "higher"),
    "rouge": ("rougeL", "higher"),
    "win_rate": ("win_rate", "higher"),
    "pairs": ("accuracy", "higher"),
    "texts": ("loss", "lower"),
}
#: Settings that completions depend on; temperatures and samples are in their rows.
_SETTINGS = ("max_new_tokens", "batch_size", "seed")

Scores = dict[str, dict[str, float]]


class Suite:
    """Measures models as configured. What it needs is read and checked when it is built.

    Args:
        config: What is measured.

    Raises:
        DatasetError: If rows cannot be read.
        ValueError: If a task, template or judge cannot be used.
        ImportError: If a package is missing.
    """

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self._asked = [] if config.prompts is None else load_asked(config.prompts, config.limit)
        self._references = [ask.reference for ask in self._asked]
        self._pairs = [] if config.pairs is None else load_pairs(config.pairs, config.limit)
        self._texts = [] if config.texts is None else load_texts(config.texts, config.limit)
        self._tasks = None if config.tasks is None else Tasks(config.tasks, config.limit, config.batch_size)
        self._judge = None if config.judge is None else make_judge(config.judge)
        if config.judge is not None and config.judge.against == "reference" and not any(self._references):
            raise ValueError(
                "`judge` compares with references, but the rows of `prompts` have none. Give rows with a "
                "`completion`, or in `judge.against` the folder of another model's evaluation."
            )

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each measurement."""
        sizes = {"completions": len(self._asked), "pairs": len(self._pairs), "texts": len(self._texts)}
        return {name: size for name, size in sizes.items() if size}

    def measure(self, model: Any, tokenizer: Any, folder: Path, *, identity: Any) -> Scores:
        """Measure a model.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            folder: Where completions and answers are kept; what is there already is not made again.
            identity: Plain values that tell the model from others.

        Returns:
            Scores by measurement and metric; of several temperatures each with its own, as `rouge@0.5`.

        Raises:
            ValueError: If the folder holds completions of another model or of other settings.
            ConnectionError: If the judge does not answer.
        """
        config, scores = self._config, Scores()
        common = {"batch_size": config.batch_size, "max_length": config.max_length, "seed": config.seed}
        if self._asked:
            self._claim(folder, identity)
            self._require_others(folder)
            rows = CompletionFile(folder / COMPLETIONS, config, self._asked).complete(model, tokenizer)
            scores |= self._of_completions(rows, folder)
        if self._pairs:
            scores["pairs"] = of_pairs(model, tokenizer, self._pairs, **common)
        if self._texts:
            scores["texts"] = of_texts(model, tokenizer, self._texts, **common)
        if self._tasks is not None:
            scores |= self._tasks(model, tokenizer)
        return scores

    def _claim(self, folder: Path, identity: Any) -> None:
        now = {name: getattr(self._config, name) for name in _SETTINGS}
        now |= {"prompts": digest(self._asked), "model": identity}
        file = folder / SETTINGS
        if not file.exists():
            write_json(file, now)
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [name for name in now if before.get(name) != json.loads(json.dumps(now[name]))]:
            raise ValueError(
                f"{folder} holds completions that were made with another `{'`, `'.join(changed)}`. Remove the folder, "
                "or set another `output_dir`."
            )

    def _of_completions(self, rows: Sequence[Row], folder: Path) -> Scores:
        scores = Scores()
        for temperature in self._config.temperatures:
            own = [row for row in rows if row["temperature"] == temperature]
            found = of_completions(own, self._references, self._config.seed)
            if self._judge is not None:
                pairs = self._compared(own)
                found["win_rate"] = self._judge.judge(pairs, folder / JUDGMENTS).scores(pairs, self._config.seed)
            several = len(self._config.temperatures) > 1
            scores |= {f"{name}@{temperature:g}" if several else name: values for name, values in found.items()}
        return scores

    def _compared(self, rows: Sequence[Row]) -> list[Pair]:
        others = self._others()
        return [
            Pair(row["prompt"], self._asked[row["prompt"]].prompt, row["text"], str(other))
            for row in rows
            if (other := others(row)) is not None
        ]

    def _require_others(self, folder: Path) -> None:
        """Refuse a folder in `judge.against` that holds other prompts; a model may be compared with itself."""
        against = "reference" if self._judge is None else self._config.judge.against
        if against == "reference" or Path(against).resolve() == folder.resolve():
            return
        settings = Path(against) / SETTINGS
        known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        if known.get("prompts") != digest(self._asked):
            raise ValueError(
                f"`judge.against` is {against!r}, which holds no evaluation of the same prompts. Give `reference`, or "
                f"a folder with {COMPLETIONS} of them."
            )

    def _others(self) -> Callable[[Row], str | None]:
        against = self._config.judge.against
        if against == "reference":
            return lambda row: self._references[row["prompt"]]
        rows = read_rows(Path(against) / COMPLETIONS)
        texts = {(row["temperature"], row["sample"], row["prompt"]): row["text"] for row in rows}
        return lambda row: texts.get((row["temperature"], row["sample"], row["prompt"]))


def headline(name: str, scores: Mapping[str, float]) -> tuple[str, Better]:
    """The metric by which a measurement is known, and which values of it are better."""
    known = HEADLINES.get(name.partition("@")[0])
    return known or (headline_of(list(scores)), "higher")
