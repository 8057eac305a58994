"""Everything that an evaluation measures of one model, with its files in one folder."""

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hbat.config.evaluation import Measured
from hbat.evaluation.completions import Row, complete, place_of, prompt_ids, read_rows
from hbat.evaluation.endpoint import JudgeError
from hbat.evaluation.judges import Judge, Pair, make_judge
from hbat.evaluation.likelihood import of_pairs, of_texts, pair_sequences, room
from hbat.evaluation.metrics import of_completions
from hbat.evaluation.rows import load_asked, load_pairs, load_texts
from hbat.evaluation.tasks import Tasks, headline_of
from hbat.reports.files import COMPLETIONS_FILE, JUDGMENTS_FILE, SETTINGS_FILE
from hbat.reports.matrix import Better
from hbat.state.files import digest, write_json

logger = logging.getLogger(__name__)

#: The metric by which each measurement is known, and which values of it are better.
_HEADLINES: Mapping[str, tuple[str, Better]] = {
    "completions": ("ended", "higher"),
    "rouge": ("rougeL", "higher"),
    "win_rate": ("win_rate", "higher"),
    "pairs": ("accuracy", "higher"),
    "texts": ("loss", "lower"),
}
#: Settings that completions depend on; temperatures and samples are in their rows.
_SETTINGS = ("max_new_tokens", "seed")

Scores = dict[str, dict[str, float]]


class Suite:
    """Measures models as configured. What it needs is read and checked when it is built.

    Args:
        config: What is measured.
        in_run: Whether it belongs to a run, which continues without a judge that fails, and makes completions anew
            that are not those of the model as it is.

    Raises:
        DatasetError: If rows cannot be read.
        ValueError: If a task, template or judge cannot be used.
        ImportError: If a package is missing.
    """

    def __init__(self, config: Measured, *, in_run: bool = False) -> None:
        self._config, self._in_run = config, in_run
        limit, on_bad_rows = config.limit, config.on_bad_rows
        self._asked = [] if config.prompts is None else load_asked(config.prompts, limit, on_bad_rows)
        self._references = [ask.reference for ask in self._asked]
        if any(self._references) and importlib.util.find_spec("rouge_score") is None:
            raise ImportError("ROUGE requires rouge-score. Install it with `pip install 'hbat-trl[eval]'`.")
        self._pairs = [] if config.pairs is None else load_pairs(config.pairs, limit, on_bad_rows)
        self._texts = [] if config.texts is None else load_texts(config.texts, limit)
        self._tasks = None if not config.tasks else Tasks(config.tasks, limit, config.batch_size)
        self._judge = None if config.judge is None else make_judge(config.judge, config.batch_size)
        if self._judge is not None:
            self._judge.check([ask.prompt for ask in self._asked])
            if config.judge.against == "reference" and not any(self._references):
                raise ValueError(
                    "`judge` compares with references, but the rows of `prompts` have none. Give rows with a "
                    "`completion`, or in `judge.against` the folder of another model's evaluation."
                )

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each measurement."""
        sizes = {"completions": len(self._asked), "pairs": len(self._pairs), "texts": len(self._texts)}
        return {name: size for name, size in sizes.items() if size}

    @property
    def data(self) -> dict[str, str]:
        """Digest of what each measurement is made of: scores of others do not compare."""
        config = self._config
        completed = [self._asked, *(getattr(config, name) for name in _SETTINGS)]
        judged = [*completed, None if config.judge is None else asdict(config.judge)]
        made_of: dict[str, Any] = dict.fromkeys(("completions", "rouge"), completed) | {"win_rate": judged}
        made_of["pairs"] = [[list(map(str, pair.values())) for pair in self._pairs], config.max_length]
        made_of["texts"] = [self._texts, config.max_length]
        sources = {"pairs": self._pairs, "texts": self._texts, "win_rate": self._judge}
        made_of = {name: parts for name, parts in made_of.items() if sources.get(name, self._asked)}
        made_of |= dict.fromkeys(() if self._tasks is None else self._tasks.names, config.limit)
        return {name: digest(json.loads(json.dumps(parts, default=str))) for name, parts in made_of.items()}

    def headline(self, name: str, scores: Mapping[str, float]) -> tuple[str, Better]:
        """The metric by which a measurement is known, and which values of it are better."""
        if (known := _HEADLINES.get(name.partition("@")[0])) is not None:
            return known
        metric = headline_of(list(scores))
        return metric, "lower" if self._tasks is not None and self._tasks.is_lower_better(name, metric) else "higher"

    def check(self, model: Any, tokenizer: Any) -> list[list[int]]:
        """Refuse rows that do not fit a model, before anything is measured.

        Returns:
            The tokens of the prompts.

        Raises:
            ValueError: If a row cannot be tokenized, or a prompt leaves no room for a completion.
        """
        new = self._config.max_new_tokens
        ids = prompt_ids(self._asked, model, tokenizer, name="`prompts`", new_tokens=new) if self._asked else []
        if getattr(tokenizer, "chat_template", None) and any(isinstance(ask.prompt, str) for ask in self._asked):
            logger.warning(
                "`prompts` are plain texts, which are completed as they are, without the tokenizer's chat template. "
                "For a chat model give them as messages, or as instructions in the layout of Alpaca."
            )
        pair_sequences(self._pairs, tokenizer, room(model, self._config.max_length))
        return ids

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
            ValueError: If rows do not fit the model, or the folder holds completions of another one or of other
                settings.
            JudgeError: If the judge does not answer.
        """
        ids = self.check(model, tokenizer)
        config, scores = self._config, Scores()
        common = {"batch_size": config.batch_size, "max_length": config.max_length, "seed": config.seed}
        if self._asked:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim(folder, {"model": identity, "tokens": digest(ids)})
            if self._judge is not None:
                self._require_others(folder)
            rows = complete(folder / COMPLETIONS_FILE, config, self._asked, ids, model, tokenizer)
            scores |= self._of_completions(rows, folder)
        if self._pairs:
            scores["pairs"] = of_pairs(model, tokenizer, self._pairs, **common)
        if self._texts:
            scores["texts"] = of_texts(model, tokenizer, self._texts, **common)
        if self._tasks is not None:
            scores |= self._tasks(model, tokenizer)
        return scores

    def _claim(self, folder: Path, own: Mapping[str, Any]) -> None:
        """Write down what the folder's completions are of; they are no others."""
        now = {name: getattr(self._config, name) for name in _SETTINGS} | {"prompts": digest(self._asked), **own}
        now = json.loads(json.dumps(now))  # as it is read back
        file = folder / SETTINGS_FILE
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if before is not None and before != now:
            if not self._in_run:
                changed = "`, `".join(name for name in now if before.get(name) != now[name])
                raise ValueError(
                    f"{folder} holds completions that were made with another `{changed}`. Remove the folder, or set "
                    "another `output_dir`."
                )
            (folder / COMPLETIONS_FILE).unlink(missing_ok=True)
        write_json(file, now)

    def _of_completions(self, rows: Sequence[Row], folder: Path) -> Scores:
        scores = Scores()
        for temperature in self._config.temperatures:
            own = [row for row in rows if row["temperature"] == temperature]
            found = of_completions(own, self._references, self._config.seed)
            if self._judge is not None:
                found |= self._judged(self._judge, own, folder)
            several = len(self._config.temperatures) > 1
            scores |= {f"{name}@{temperature:g}" if several else name: values for name, values in found.items()}
        return scores

    def _judged(self, judge: Judge, rows: Sequence[Row], folder: Path) -> Scores:
        against = self._config.judge.against
        if against == "reference":
            others = {place_of(row): self._references[row["prompt"]] for row in rows}
        else:
            others = {place_of(row): row["text"] for row in read_rows(Path(against) / COMPLETIONS_FILE)}
        pairs = [
            Pair(row["prompt"], self._asked[row["prompt"]].prompt, row["text"], str(other))
            for row in rows
            if (other := others.get(place_of(row))) is not None
        ]
        if not pairs:
            raise ValueError(
                f"`judge.against` {against!r} has no completions at temperature "
                f"{rows[0]['temperature']:g}. Complete them there first."
            )
        try:
            # Beside the folders of all models, so that the same question is paid for once.
            verdicts = judge.judge(pairs, folder.parent / JUDGMENTS_FILE)
        except JudgeError as error:
            if not self._in_run:
                raise
            logger.warning("%s The run continues without a win rate.", error)
            return {}
        return {"win_rate": verdicts.scores(pairs, self._config.seed)}

    def _require_others(self, folder: Path) -> None:
        """Refuse a folder in `judge.against` that holds other prompts; a model may be compared with itself."""
        against = self._config.judge.against
        if against == "reference" or Path(against).resolve() == folder.resolve():
            return
        settings = Path(against) / SETTINGS_FILE
        known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        if known.get("prompts") != digest(self._asked):
            raise ValueError(
                f"`judge.against` is {against!r}, which holds no evaluation of the same prompts. Give `reference`, or "
                f"a folder with {COMPLETIONS_FILE} of them."
            )
