"""Options of an evaluation of models, with their help texts and checks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from hbat.config.fields import at_home, build_section, check_choice, check_number, check_whole, shown

After = Literal["stage", "round", "end"]
OnBadRows = Literal["raise", "drop"]


@dataclass(kw_only=True)
class JudgeConfig:
    """Who compares completions with others, and how. Each field is described by its `help`."""

    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Sequence classification model by name on the Hub or local folder: it prefers the completion with "
            "the higher score, and needs no endpoint."
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Model of an OpenAI-compatible endpoint, which is asked twice for every pair: in both orders."
        },
    )
    base_url: str | None = field(
        default=None,
        metadata={"help": "Address of the endpoint, such as `http://localhost:8000/v1`. Default: OpenAI's."},
    )
    api_key_env: str | None = field(
        default=None,
        metadata={
            "help": "Environment variable with the endpoint's key, which is written nowhere. Default: OPENAI_API_KEY "
            "for OpenAI, and no key for another `base_url`."
        },
    )
    template: str = field(
        default="dialogue",
        metadata={
            "help": "Question to the endpoint: `summarization`, `dialogue`, or a text file with `{prompt}`, `{first}` "
            "and `{second}` that asks for a last line `Preferred: A`, `B` or `tie`."
        },
    )
    against: str = field(
        default="reference",
        metadata={
            "help": "What the completions are compared with: the `reference` of each prompt's row, or the folder of "
            "another model's evaluation with the same prompts and temperatures."
        },
    )
    options: dict[str, Any] = field(
        default_factory=lambda: {"temperature": 0, "max_tokens": 256},
        metadata={
            "help": "Further fields of each request's body. Some models take `max_completion_tokens` and no "
            "`temperature`."
        },
    )
    parallel: int = field(default=4, metadata={"help": "Number of requests to the endpoint at a time."})
    max_retries: int = field(
        default=5,
        metadata={
            "help": "Number of times a request is repeated, with exponential backoff or as the endpoint asks, after a "
            "timeout, a lost connection, a status of 408, 409, 429 or 500 and above, or a body that cannot be read."
        },
    )
    timeout: float = field(default=60.0, metadata={"help": "Seconds to wait for an answer."})

    def __post_init__(self) -> None:
        if (self.reward_model is None) == (self.model is None):
            raise ValueError(
                "`judge` needs either a `reward_model`, or the `model` of an endpoint (with its `base_url`)."
            )
        for name in ("reward_model", "template", "against"):
            setattr(self, name, at_home(getattr(self, name)))
        for name, low in (("parallel", 1), ("max_retries", 0)):
            check_whole(name, getattr(self, name), low)
        check_number("timeout", self.timeout, 0)
        if self.api_key_env is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("`judge.api_key_env` is no name of an environment variable. Put the key into a variable.")
        if urlsplit(self.base_url or "").username is not None:
            raise ValueError("`judge.base_url` has a user name or password in it. Put a key into `judge.api_key_env`.")


@dataclass(kw_only=True)
class Measured:
    """What an evaluation measures. Each field is described by its `help`."""

    prompts: Any = field(
        default=None,
        metadata={
            "help": "Held-out rows whose prompts are completed, as `datasets` names data. The row's `completion`, "
            "`chosen` or last answer is its reference, with which ROUGE compares (package rouge-score)."
        },
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "Sampling temperatures; 0, the default, decodes greedily."}
    )
    samples: int = field(
        default=1, metadata={"help": "Completions of each prompt at every temperature above 0; the paper takes 3."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum number of tokens of a completion."})
    batch_size: int = field(
        default=8, metadata={"help": "Sequences in memory at a time, when completing and when scoring."}
    )
    pairs: Any = field(
        default=None,
        metadata={"help": "Rows of preference data: how often the model finds `chosen` likelier, and by how much."},
    )
    texts: Any = field(
        default=None,
        metadata={
            "help": "Plain texts: their cross-entropy, whose drift over a run shows what was forgotten. A file with a "
            "text in every line (.txt, .txt.gz), or rows with a `text`."
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-eval by name, or YAML files of tasks of your own, which work offline (extra `eval`)."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Number of rows that are taken of each set and task."})
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Maximum number of tokens of `pairs`, which lose the beginning of their prompts, and of `texts`, "
            "which lose their ends. At most the model's context."
        },
    )
    on_bad_rows: OnBadRows = field(
        default="raise",
        metadata={
            "help": "What to do with rows that cannot be used, as in training: `raise` an error, or `drop` them."
        },
    )
    judge: Any = field(
        default=None,
        metadata={"help": "Who compares the completions with others, as a mapping; `null` compares none."},
    )
    seed: int = field(default=42, metadata={"help": "Random seed of sampling and of bootstrap intervals."})

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("max_new_tokens", 1), ("batch_size", 1), ("max_length", 2)):
            check_whole(name, getattr(self, name), low)
        check_whole("seed", self.seed, 0)
        check_choice("on_bad_rows", self.on_bad_rows, OnBadRows)
        if self.limit is not None:
            check_whole("limit", self.limit, 1)
        self._check_lists()
        sources = ("prompts", "pairs", "texts", "tasks")
        for name in sources:
            setattr(self, name, at_home(getattr(self, name)))
        if not any(getattr(self, name) for name in sources):
            raise ValueError("Nothing is measured: give `prompts`, `pairs`, `texts` or `tasks`.")
        self._check_judge()

    def _check_lists(self) -> None:
        for name in ("temperatures", "tasks"):
            if not isinstance(getattr(self, name), list | tuple | None):
                raise TypeError(f"`{name}` is {shown(getattr(self, name))}; it must be a list.")
        for temperature in self.temperatures or ():
            check_number("temperatures", temperature, 0)
        self.temperatures = [float(temperature) for temperature in self.temperatures or ()]  # which seed the samples
        if not self.temperatures or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"`temperatures` is {shown(self.temperatures)}; it must be a list of different numbers.")

    def _check_judge(self) -> None:
        if isinstance(self.judge, Mapping):
            self.judge = build_section("judge", JudgeConfig, self.judge)
        if not isinstance(self.judge, JudgeConfig | None):
            raise TypeError(f"`judge` is a {type(self.judge).__name__}; it must be a mapping or null.")
        if self.judge is not None and self.prompts is None:
            raise ValueError("`judge` compares completions: give `prompts`.")


@dataclass(kw_only=True)
class EvalConfig(Measured):
    """What a run measures, and when. Each field is described by its `help`."""

    after: After = field(
        default="stage",
        metadata={
            "help": "When the run is measured: at the start and after every `stage` or `round`, or at the `end`."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("after", self.after, After)
