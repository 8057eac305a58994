"""PPOConfig: fields, help and validation of PPO's options."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import GenerationConfig, TrainingArguments

from hbat.config.fields import check_choice, check_number, check_whole, nearest
from hbat.ppo.maths import KLEstimator

Critic = Literal["shared", "separate"]


_OWN_GENERATION_FIELDS = {
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "temperature": "temperature",
    "pad_token_id": "the tokenizer's pad token",
    "num_return_sequences": "one completion a prompt",
    "num_beams": "one completion a prompt",
    "do_sample": "the policy is sampled from",
    "use_cache": "always on",
    "return_dict_in_generate": "the completions alone are needed",
}


@dataclass(kw_only=True)
class PPOConfig(TrainingArguments):
    """Options of PPO beside those of `transformers.TrainingArguments`. The help of each field is its description.

    A rollout is `rollout_batch_size` prompts a process. It is trained on in `num_ppo_epochs` passes of
    `rollout_batch_size / (per_device_train_batch_size * gradient_accumulation_steps)` optimizer steps each, so
    `max_steps`, `save_steps` and the like count optimizer steps as in every other trainer, and an epoch is one pass
    over the prompts.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Compute in bfloat16. If not set: true, unless `fp16` is, as in TRL."}
    )
    remove_unused_columns: bool | None = field(  # type: ignore[assignment]
        default=False, metadata={"help": "Must stay false: reward functions get all columns."}
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of a rollout on each process: a multiple of per_device_train_batch_size * "
            "gradient_accumulation_steps, which is the default."
        },
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    max_completion_length: int = field(default=128, metadata={"help": "Most tokens of a completion."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling; log-probabilities are taken at it as well."}
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "Share of the probability mass to sample from. Log-probabilities stay those of all tokens."},
    )
    top_k: int = field(default=0, metadata={"help": "Number of likeliest tokens to sample from; 0 for all."})
    generation_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Other fields of transformers.GenerationConfig, such as stop_strings, min_new_tokens or "
            "repetition_penalty."
        },
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Prompts generated for at once; the whole rollout where not set."}
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a forward pass that scores the rollout; per_device_train_batch_size where not set."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments for the chat template of conversational prompts."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 1.0 each where not set."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of completions that do not end by themselves."}
    )
    kl_coef: float = field(
        default=0.05,
        metadata={"help": "Weight of the KL penalty to the reference policy, which each token's reward has."},
    )
    kl_estimator: KLEstimator = field(
        default="k1",
        metadata={"help": "Estimator of the KL: k1 is log p/q, k3 is q/p - 1 + log p/q (of smaller variance)."},
    )
    adaptive_kl: bool = field(
        default=False, metadata={"help": "Move kl_coef after every rollout so that the KL approaches kl_target."}
    )
    kl_target: float = field(
        default=6.0, metadata={"help": "With adaptive_kl: KL of a completion, summed over its tokens, to aim at."}
    )
    kl_horizon: float = field(
        default=10000.0,
        metadata={"help": "With adaptive_kl: samples over which a relative error of 1 is made up for."},
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Skip a rollout's remaining updates once the KL between the policy that sampled and the one being "
            "trained, a token, exceeds this."
        },
    )
    cliprange: float = field(default=0.2, metadata={"help": "Range of the probability ratio in the surrogate."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Range of the critic's change in its loss."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the critic's loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    gamma: float = field(default=1.0, metadata={"help": "Discount a token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Bring a rollout's token rewards to unit variance."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Bring a rollout's advantages to mean zero and unit variance."}
    )
    critic: Critic = field(
        default="shared",
        metadata={
            "help": "`shared`: a value head on the policy's own trunk. `separate`: a value model of its own, made "
            "from the policy's weights or from critic_model_name_or_path."
        },
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model that a separate critic starts from, such as the reward model."}
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic's own parameters; learning_rate where not set."}
    )

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        self._check_counts()
        self._check_numbers()
        self._check_critic()
        self._check_host_options()
        self._check_generation_kwargs()

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of `transformers.GenerationConfig` that say how completions are sampled."""
        own = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return own | (self.generation_kwargs or {})

    @property
    def rollout_size(self) -> int:
        """Prompts of a rollout on each process."""
        return self.rollout_batch_size or self._update_size

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps of one pass over a rollout."""
        return self.rollout_size // self._update_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.updates_per_pass * self.num_ppo_epochs

    @property
    def _update_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def _check_counts(self) -> None:
        counts = ("rollout_batch_size", "generation_batch_size", "scoring_batch_size")
        for name in (
            "num_ppo_epochs",
            "max_completion_length",
            *(each for each in counts if getattr(self, each) is not None),
        ):
            check_whole(name, getattr(self, name), 1)
        if self.rollout_size % self._update_size:
            raise ValueError(
                f"`rollout_batch_size` is {self.rollout_batch_size}, which is not a multiple of "
                f"per_device_train_batch_size * gradient_accumulation_steps = {self.per_device_train_batch_size} * "
                f"{self.gradient_accumulation_steps} = {self._update_size}: each optimizer step needs as many rows."
            )

    def _check_numbers(self) -> None:
        for name in ("temperature", "cliprange", "cliprange_value", "kl_target", "kl_horizon", "target_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; it must be above 0.")
        for name in ("kl_coef", "vf_coef", "entropy_coef"):
            check_number(name, getattr(self, name), 0)
        for name in ("gamma", "lam"):
            check_number(name, getattr(self, name), 0, 1)
        check_whole("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it must be above 0 and at most 1.")
        check_choice("kl_estimator", self.kl_estimator, KLEstimator)
        if self.adaptive_kl and self.kl_coef == 0:
            raise ValueError("`adaptive_kl` multiplies `kl_coef`, which is 0. Start from a positive one.")

    def _check_critic(self) -> None:
        check_choice("critic", self.critic, Critic)
        if self.critic_model_name_or_path is not None and self.critic != "separate":
            raise ValueError(
                "`critic_model_name_or_path` is set, which only a critic of its own has: `critic: separate`."
            )

    def _check_generation_kwargs(self) -> None:
        valid = vars(GenerationConfig())
        for key in self.generation_kwargs or {}:
            if key in _OWN_GENERATION_FIELDS:
                raise ValueError(
                    f"`generation_kwargs` sets {key!r}, which is PPO's own ({_OWN_GENERATION_FIELDS[key]})."
                )
            if key not in valid or key.startswith("_"):
                raise ValueError(
                    f"`generation_kwargs` sets {key!r}, which `transformers.GenerationConfig` does not have."
                    f"{nearest(key, valid)}"
                )

    def _check_host_options(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` is true, but reward functions get all columns. Leave it out.")
        if self.auto_find_batch_size:
            raise ValueError("`auto_find_batch_size` is true, but a rollout's size is fixed. Set the batch size.")
        if self.fp16 and self.target_kl is not None:
            raise ValueError(
                "`target_kl` skips updates, which the loss scaling of `fp16` cannot. Use `bf16`, or leave one out."
            )
        for name in ("label_smoothing_factor", "use_liger_kernel", "neftune_noise_alpha", "load_best_model_at_end"):
            if getattr(self, name, None):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which PPO does not support. Leave it out.")
