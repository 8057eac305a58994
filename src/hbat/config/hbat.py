"""Options of a run, with their help texts and checks. Imports no trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from hbat.config.chain import name_of, named, require_rounds, shares_of
from hbat.config.evaluation import EvalConfig, OnBadRows
from hbat.config.ewc import EWCConfig
from hbat.config.fields import at_home, build_section, check_choice, check_number, check_whole, nearest, shown
from hbat.config.section_fields import OBJECTIVES

T = TypeVar("T")

OptimizerState = Literal["reset", "carry"]
LRSchedule = Literal["stage", "run", "decay"]
OnNaN = Literal["stop", "rollback"]
PPOBackend = Literal["hbat", "trl"]


def _section_help(config_class: str, stages: str) -> dict[str, str]:
    return {"help": f"Arguments of `{config_class}` for the {stages} stages, as a mapping or an instance."}


@dataclass(kw_only=True)
class HBATConfig:
    """Configuration of `HBATTrainer`. Each field is described by its `help`."""

    output_dir: str = field(
        metadata={
            "help": "Output directory of the run: its state, checkpoints of stages, the final model, logs and tables."
        }
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Whether to remove the run that `output_dir` holds, if any, and start over. Other files there are "
            "left alone."
        },
    )
    continue_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a finished run that this one continues, with new data and in a new `output_dir`: from "
            "its weights, its objectives' importance, optimizer moments and critic, with its rows of scores. That "
            "folder is left as it is."
        },
    )
    num_rounds: int = field(
        default=1,  # docs/does-it-work.md, "Rounds": more rounds on the same data did not help
        metadata={
            "help": "Number of rounds N. Every data set is split into N parts, and each round trains every objective "
            "on one part of its data. `1` trains one objective after the other, with `ewc` holding later ones back."
        },
    )
    rounds: list[Any] | None = field(
        default=None,
        metadata={
            "help": "Share of each objective's data in every round, as a list with a mapping per round such as "
            "`[{sft: 0.8, dpo: 0.2}, {sft: 0.2, dpo: 0.8}]`: an objective without a share is not trained in that "
            "round. It sets `num_rounds`. Default: equal shares."
        },
    )
    objectives: list[Any] = field(
        default_factory=lambda: ["sft", "dpo"],
        metadata={
            "help": "Objectives of a round, in the order in which they are trained: `sft`, `dpo`, `kto`, `ppo`, "
            "`grpo`, `rloo`, `distillation`; a mapping with a `name`, the `trainer` (one of these, or a class such as "
            "`trl.SFTTrainer`) and its `args`; in Python also `hbat.Objective` instances. The second `sft` of "
            "`[sft, dpo, sft]` has the name `sft_2`, and data of its own."
        },
    )
    sft: Any = field(default=None, metadata=_section_help("trl.SFTConfig", "SFT"))
    dpo: Any = field(default=None, metadata=_section_help("trl.DPOConfig", "DPO"))
    kto: Any = field(default=None, metadata=_section_help("trl.KTOConfig", "KTO"))
    ppo: Any = field(default=None, metadata=_section_help("hbat.PPOConfig", "PPO"))
    grpo: Any = field(default=None, metadata=_section_help("trl.GRPOConfig", "GRPO"))
    rloo: Any = field(default=None, metadata=_section_help("trl.RLOOConfig", "RLOO"))
    distillation: Any = field(default=None, metadata=_section_help("trl.DistillationConfig", "distillation"))
    ppo_backend: PPOBackend = field(
        default="hbat",
        metadata={
            "help": "PPO implementation: `hbat` for the one of this library, `trl` for TRL's `PPOTrainer` (TRL below "
            "1.13)."
        },
    )
    ewc: Any = field(
        default_factory=EWCConfig,
        metadata={
            "help": "Elastic weight consolidation, as a mapping or an `EWCConfig`. `null` disables it: the objectives "
            "alternate without a penalty."
        },
    )
    optimizer_state: OptimizerState = field(
        default="carry",
        metadata={
            "help": "Optimizer state at the start of a stage. `carry`: the moments at the end of the same objective's "
            "previous stage. `reset`: a new optimizer. The learning rate follows the stage's own schedule in both "
            "cases."
        },
    )
    lr_schedule: Any = field(
        default="stage",
        metadata={
            "help": "Scope of the learning rate schedule, as one value or a mapping from objective to value. `stage`: "
            "the schedule restarts in every stage. `run`: one schedule spans all stages of an objective. `decay`: "
            "like `stage`, multiplied by 1 - n/N in round n = 0, ..., N-1."
        },
    )
    end_weight: float = field(
        default=1.0,  # docs/does-it-work.md, "The main table": sampled, the small base's best; `hbat front` chooses
        metadata={
            "help": "Weight of the end of the run's last stage in the average with its start: after that stage alone "
            "the weights are set to start + end_weight * (end - start), with a number between 0 and 1. `1.0` keeps "
            "the end as it is. `hbat front` measures the line between the two after training."
        },
    )
    replay: Any = field(
        default=None,
        metadata={
            "help": "Share of SFT rows that the stages of all other objectives train on too, as a mapping such as "
            "`sft: 0.1`: an optimizer step over B rows adds 0.1 * B of them on average, from all rounds so far, each "
            "with the weight of one of the B. Only `sft` can be replayed. `null` disables it."
        },
    )
    use_cpu: bool = field(
        default=False,
        metadata={"help": "Whether to train on the CPU: `use_cpu` of every section that does not set it."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "`bf16` of every section that sets neither `bf16` nor `fp16`. Default: TRL's."}
    )
    on_bad_rows: OnBadRows = field(
        default="raise",
        metadata={
            "help": "What to do with rows that cannot be trained on: `raise` an error that names the first of each "
            "data set, or `drop` them with a warning that counts them by kind of fault."
        },
    )
    on_nan: OnNaN = field(
        default="stop",
        metadata={
            "help": "What to do when a loss, gradient, weight or importance is NaN or infinite: `stop` with an error "
            "that names it, or `rollback` to the start of the stage and retry with half the learning rate."
        },
    )
    max_rollbacks: int = field(
        default=3,
        metadata={"help": "Maximum number of rollbacks per stage. Only used with `on_nan: rollback`."},
    )
    keep_states: int = field(
        default=2,
        metadata={
            "help": "Number of complete run states to keep on disk. If a file of the newest one is damaged, the run "
            "resumes from the one before it. Each state after the first takes the disk space of the trainable weights "
            "and of one objective's importance and Adam moments."
        },
    )
    seed: int = field(
        default=42,
        metadata={
            "help": "Random seed for splitting the data sets and initializing new adapters. Stages are seeded by the "
            "`seed` of their section."
        },
    )
    sample_prompts: Any = field(
        default=None,
        metadata={
            "help": "Prompts that are completed at the start and after every stage, with the same seed, into "
            "`completions.jsonl`: a number of rows of each evaluation set, a list of prompts (texts or messages), or "
            "a file of them. At most 128 new tokens at temperature 0.75."
        },
    )
    evaluation: Any = field(
        default=None,
        metadata={
            "help": "What the run measures beside its objectives' own evaluation, as a mapping or an `EvalConfig`: "
            "completions and their ROUGE or win rate, likelihoods, tasks of lm-eval. One process only."
        },
    )
    report_to: Any = field(
        default="none",
        metadata={
            "help": "Integrations that the whole run reports to, as in `transformers.TrainingArguments`: `none`, "
            "`tensorboard`, `wandb`, ..."
        },
    )
    run_name: str | None = field(default=None, metadata={"help": "Name of the run in the integrations."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Whether to disable the progress bar."})
    model_init_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, ...), used "
            "when the model is given by name or path."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template for all objectives: a Jinja file (`.jinja`, `.j2`), the template itself, or the "
            "name or folder of a tokenizer, whose special tokens are added too, with the embeddings resized. Default: "
            "the tokenizer's own."
        },
    )
    keep_adapter_dtype: bool = field(
        default=True,
        metadata={
            "help": "Whether an adapter on a base in 4 or 8 bits keeps its dtype, which is float32 for a new one. "
            "`False`: TRL casts it to bfloat16, which rounds away most updates of a small learning rate."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str) or not self.output_dir:
            raise ValueError(f"`output_dir` is {self.output_dir!r}; it must be the path of a directory.")
        self.output_dir = at_home(self.output_dir)
        if self.continue_from is not None:
            self._check_continue_from()
        if not isinstance(self.chat_template, str | None) or self.chat_template == "":
            raise ValueError(
                f"`chat_template` is {shown(self.chat_template)}; it must be a Jinja file, a template or a tokenizer."
            )
        self.chat_template = at_home(self.chat_template)
        check_whole("num_rounds", self.num_rounds, 1)
        check_whole("seed", self.seed, 0)
        check_whole("keep_states", self.keep_states, 1)
        self.objectives = named(self.objectives)
        if self.rounds is not None:
            require_rounds(self.rounds, self.num_rounds, self.objective_names)
            self.num_rounds = len(self.rounds)
        self._check_replay()
        self._check_sample_prompts()
        check_choice("optimizer_state", self.optimizer_state, OptimizerState)
        check_choice("on_bad_rows", self.on_bad_rows, OnBadRows)
        check_choice("on_nan", self.on_nan, OnNaN)
        check_whole("max_rollbacks", self.max_rollbacks, 0)
        check_choice("ppo_backend", self.ppo_backend, PPOBackend)
        for name in self.objective_names:
            check_choice("lr_schedule", self.lr_schedule_of(name), LRSchedule)
        check_number("end_weight", self.end_weight, 0, 1)
        self.ewc = self._own_section("ewc", EWCConfig)
        self.evaluation = self._own_section("evaluation", EvalConfig)

    def _own_section(self, name: str, config_class: type[T]) -> T | None:
        value = getattr(self, name)
        if isinstance(value, Mapping):
            return build_section(name, config_class, value)
        if not isinstance(value, config_class | None):
            raise TypeError(
                f"`{name}` is a {type(value).__name__}; it must be a mapping, an `{config_class.__name__}` or null."
            )
        return value

    def _check_continue_from(self) -> None:
        if not isinstance(self.continue_from, str) or not self.continue_from:
            raise ValueError(f"`continue_from` is {shown(self.continue_from)}; it must be a finished run's folder.")
        self.continue_from = at_home(self.continue_from)
        if Path(self.continue_from).resolve() == Path(self.output_dir).resolve():
            raise ValueError(
                f"`continue_from` and `output_dir` are both {self.output_dir!r}; a run is continued in another "
                "folder. To finish an interrupted one, omit `continue_from` and resume it (`--resume`)."
            )

    def _check_replay(self) -> None:
        if not isinstance(self.replay, Mapping | None):
            raise TypeError(f"`replay` is {shown(self.replay)}; it must be a mapping such as {{'sft': 0.1}}, or null.")
        for name, share in (self.replay or {}).items():
            if name != "sft":
                raise ValueError(
                    f"`replay` names {shown(name)}; only rows of 'sft' can be replayed, whose loss needs no reference "
                    "policy and no reward. Remove it."
                )
            check_number("replay.sft", share, 0, 1)
            if "sft" not in self.objectives:
                raise ValueError(
                    f"`replay` needs the built-in objective 'sft', but `objectives` is {self.objective_names}."
                )

    def _check_sample_prompts(self) -> None:
        given = self.sample_prompts
        known = isinstance(given, int | str | Path | list | tuple | Mapping | None) and not isinstance(given, bool)
        if not known or (given is not None and not given):
            raise ValueError(
                f"`sample_prompts` is {shown(given)}; it must be a number of rows, a list of prompts or a file."
            )
        if isinstance(given, int):
            check_whole("sample_prompts", given, 1)
        self.sample_prompts = at_home(given)

    @property
    def objective_names(self) -> list[str]:
        """Names of the objectives of a round, in order."""
        return [name_of(entry) for entry in self.objectives]

    @property
    def shares(self) -> dict[str, tuple[float, ...]] | None:
        """Share of each objective's rows in every round; None if all are equal."""
        return None if self.rounds is None else shares_of(self.rounds, self.objective_names)

    @property
    def trainers(self) -> dict[str, str]:
        """Trainer of each objective that names one."""
        named = {entry["name"]: entry["trainer"] for entry in self.objectives if isinstance(entry, Mapping)}
        return {
            name: trainer if isinstance(trainer, str) else f"{trainer.__module__}.{trainer.__qualname__}"
            for name, trainer in named.items()
        }

    def section(self, objective: Any) -> Any:
        """What an entry of `objectives` sets of its trainer's arguments."""
        if isinstance(objective, str):
            return getattr(self, objective, None)
        if not isinstance(objective, Mapping):
            return getattr(objective, "config", None)
        named = [name for name in (objective["name"], objective["trainer"]) if name in OBJECTIVES]
        return objective.get("args", getattr(self, named[0]) if named else None)

    @property
    def shared_fields(self) -> dict[str, Any]:
        """Fields that every section gets which does not set them."""
        given = {"use_cpu": True} if self.use_cpu else {}
        return given if self.bf16 is None else {**given, "bf16": self.bf16}

    def as_text(self) -> dict[str, str]:
        """Values of all fields as text, to find what was changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: repr(value.to_dict() if hasattr(value, "to_dict") else value) for name, value in values.items()}

    @property
    def replay_share(self) -> float:
        """Replayed SFT rows per row of a stage of another objective; 0 without replay."""
        return float((self.replay or {}).get("sft", 0.0))

    def lr_schedule_of(self, objective: str) -> str:
        """Learning rate schedule of an objective: `stage`, `run` or `decay`."""
        if not isinstance(self.lr_schedule, Mapping):
            return str(self.lr_schedule)
        for key in self.lr_schedule:
            if key not in self.objective_names:
                raise ValueError(
                    f"`lr_schedule` names the objective {key!r}, which is not among {self.objective_names}."
                    f"{nearest(str(key), self.objective_names)}"
                )
        return str(self.lr_schedule.get(objective, "stage"))
