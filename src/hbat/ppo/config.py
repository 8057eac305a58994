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
    "num_return_sequences": "one completion per prompt",
    "num_beams": "one completion per prompt",
    "do_sample": "always on",
    "use_cache": "always on",
    "return_dict_in_generate": "always off",
}


@dataclass(kw_only=True)
class PPOConfig(TrainingArguments):
    """Options of PPO, in addition to those of `transformers.TrainingArguments`; each field's help describes it.

    A rollout is `rollout_batch_size` prompts per process. It is trained on in `num_ppo_epochs` passes of
    `rollout_batch_size / (per_device_train_batch_size * gradient_accumulation_steps)` optimizer steps each, so
    `max_steps`, `save_steps` and the like count optimizer steps as in every other trainer, and an epoch is one pass
    over the prompts.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimizer steps."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Train in bfloat16 mixed precision. Defaults to true unless `fp16` is set."}
    )
    remove_unused_columns: bool | None = field(  # type: ignore[assignment]
        default=False, metadata={"help": "Must be false: reward functions receive all columns."}
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts per rollout and process. Must be a multiple of per_device_train_batch_size * "
            "gradient_accumulation_steps, which is the default."
        },
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Number of epochs to train on each rollout."})
    max_completion_length: int = field(default=128, metadata={"help": "Maximum number of tokens per completion."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature, also applied to the logits for log-probabilities."}
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Cumulative probability of the tokens to sample from (nucleus sampling). Log-probabilities are "
            "taken over the whole vocabulary."
        },
    )
    top_k: int = field(
        default=0, metadata={"help": "Number of most likely tokens to sample from; 0 for the whole vocabulary."}
    )
    generation_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Other fields of transformers.GenerationConfig, such as stop_strings, min_new_tokens or "
            "repetition_penalty."
        },
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size for generation. Defaults to the whole rollout."}
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Batch size for the log-probabilities and values of a rollout. Defaults to "
            "per_device_train_batch_size."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments for the chat template of conversational prompts."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. Defaults to 1.0 each."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Penalty subtracted from the score of completions that do not end with EOS."}
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "KL coefficient: weight of the KL penalty in each token's reward."}
    )
    kl_estimator: KLEstimator = field(
        default="k1",
        metadata={"help": "KL estimator: k1 is log p/q, k3 is q/p - 1 + log p/q, which has a smaller variance."},
    )
    adaptive_kl: bool = field(
        default=False, metadata={"help": "Adapt kl_coef after every rollout so that the KL approaches kl_target."}
    )
    kl_target: float = field(
        default=6.0, metadata={"help": "Target KL per completion, summed over its tokens, of adaptive_kl."}
    )
    kl_horizon: float = field(
        default=10000.0,
        metadata={"help": "Horizon of adaptive_kl, in samples; a longer one adapts kl_coef more slowly."},
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Early stopping: skip a rollout's remaining updates once the approximate KL per token between the "
            "old and the new policy exceeds this."
        },
    )
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value loss."})
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Coefficient of the entropy bonus."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation (GAE)."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale a rollout's token rewards to unit variance."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Normalize a rollout's advantages to zero mean and unit variance."}
    )
    critic: Critic = field(
        default="shared",
        metadata={
            "help": "`shared`: a value head on the policy's trunk. `separate`: a value model of its own, initialized "
            "from the policy or from critic_model_name_or_path."
        },
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to initialize a separate critic from, such as the reward model."}
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic's own parameters. Defaults to learning_rate."}
    )

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        self._check_counts()
        self._check_numbers()
        self._check_choices()
        self._check_trainer_options()
        self._check_generation_kwargs()

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of `transformers.GenerationConfig` for sampling completions."""
        own = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return own | (self.generation_kwargs or {})

    @property
    def rollout_size(self) -> int:
        """Prompts per rollout and process."""
        return self.rollout_batch_size or self._update_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.rollout_size // self._update_size * self.num_ppo_epochs

    @property
    def _update_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def _check_counts(self) -> None:
        optional = ("rollout_batch_size", "generation_batch_size", "scoring_batch_size")
        given = [name for name in optional if getattr(self, name) is not None]
        for name in ("num_ppo_epochs", "max_completion_length", *given):
            check_whole(name, getattr(self, name), 1)
        check_whole("top_k", self.top_k, 0)
        if self.rollout_size % self._update_size:
            raise ValueError(
                f"`rollout_batch_size` is {self.rollout_batch_size}, which is not a multiple of "
                f"per_device_train_batch_size * gradient_accumulation_steps = {self.per_device_train_batch_size} * "
                f"{self.gradient_accumulation_steps} = {self._update_size}, the rows of an optimizer step."
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
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it must be above 0 and at most 1.")
        if self.adaptive_kl and self.kl_coef == 0:
            raise ValueError("`adaptive_kl` multiplies `kl_coef`, which is 0. Set a positive `kl_coef`.")

    def _check_choices(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, KLEstimator)
        check_choice("critic", self.critic, Critic)
        if self.critic_model_name_or_path is not None and self.critic != "separate":
            raise ValueError("`critic_model_name_or_path` is set, which needs `critic: separate`.")

    def _check_generation_kwargs(self) -> None:
        valid = vars(GenerationConfig())
        for key in self.generation_kwargs or {}:
            if key in _OWN_GENERATION_FIELDS:
                raise ValueError(
                    f"`generation_kwargs` sets {key!r}, which PPO sets itself ({_OWN_GENERATION_FIELDS[key]})."
                )
            if key not in valid or key.startswith("_"):
                raise ValueError(
                    f"`generation_kwargs` sets {key!r}, which `transformers.GenerationConfig` does not have."
                    f"{nearest(key, valid)}"
                )

    def _check_trainer_options(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` is true, but reward functions receive all columns. Remove it.")
        if self.auto_find_batch_size:
            raise ValueError("`auto_find_batch_size` is true, but a rollout's size is fixed. Set the batch size.")
        if self.fp16 and self.target_kl is not None:
            raise ValueError("`target_kl` skips updates, which the loss scaling of `fp16` does not allow. Use `bf16`.")
        for name in ("label_smoothing_factor", "use_liger_kernel", "neftune_noise_alpha", "load_best_model_at_end"):
            if getattr(self, name, None):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which PPO does not support. Remove it.")
