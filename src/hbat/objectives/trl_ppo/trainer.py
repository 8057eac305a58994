"""TRL's PPOTrainer with the constructor that stages call. Needs TRL below 1.13."""

import functools
import os
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from hbat.model.adapters import REFERENCE_ADAPTER, add_reference_adapter
from hbat.model.copies import switch_off_dropout, unpatched_copy
from hbat.objectives.trl_ppo.models import AnnouncedBatches, RewardsAsModel, ValueModel, collate
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.prompts import TOKENS, check_lengths, context_length, tokenize_prompts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

__all__ = ["PPOConfig", "TRLPPOTrainer"]


class TRLPPOTrainer(PPOTrainer):  # type: ignore[misc]
    """TRL's PPO on prompts and reward functions, with the policy at the start of the stage as reference policy.

    What differs from `hbat.PPOTrainer` is TRL's: it trains in the weights' precision, clips no gradients
    (`max_grad_norm` has no effect), never checkpoints activations, and cannot accumulate gradients, save or evaluate
    inside a stage; an interrupted stage starts anew. A step is a rollout of `per_device_train_batch_size` prompts with
    `num_ppo_epochs * num_mini_batches` updates, and always logged. Completions only end at `stop_token` or
    `stop_token_id`, which are not set by default.

    The arguments are those of `hbat.PPOTrainer`, but `args` TRL's own, `model` a loaded one whose adapter, if it has
    one, is named `default`, and `eval_dataset` a single one. The tokenizer has a padding token other than EOS.
    `ref_model` is by default a copy of the model, or of its adapter.

    Raises:
        ValueError: If TRL would ignore or misread an option, or rows, tokenizer and model do not fit each other.
    """

    dataloader: Any
    control: Any

    def __init__(  # noqa: PLR0913 - what stages pass, and rewards
        self,
        model: Any,
        args: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        ref_model: Any = None,
    ) -> None:
        _require_options(args)
        _require_padding(processing_class)
        rewards = Rewards(reward_funcs, processing_classes=reward_processing_classes)
        rows = self._tokenised(train_dataset, "train_dataset", model, args, processing_class)
        rewards.require(rows, eval_dataset)
        if len(rows) < args.per_device_train_batch_size:
            raise ValueError(
                f"train_dataset has {len(rows)} rows, but a rollout takes `per_device_train_batch_size` = "
                f"{args.per_device_train_batch_size} prompts. Lower it, or add rows."
            )
        if args.max_steps > 0:
            args.total_episodes = args.max_steps * args.per_device_train_batch_size
        value_model = ValueModel(model)  # before there is a second adapter to copy
        has_adapter = hasattr(model, "peft_config")
        if has_adapter:
            add_reference_adapter(model)
        elif ref_model is None:
            ref_model = unpatched_copy(model)
        switch_off_dropout(model)
        if ref_model is not None:
            switch_off_dropout(ref_model)
        super().__init__(
            args=args,
            processing_class=processing_class,
            model=model,
            ref_model=None if has_adapter else ref_model,
            reward_model=RewardsAsModel(rewards, processing_class, lambda: self.state),
            train_dataset=rows,
            value_model=value_model,
            data_collator=functools.partial(collate, pad=processing_class.pad_token_id),
            callbacks=callbacks,
        )
        rewards.to(self.accelerator.device)
        self.ref_adapter_name = REFERENCE_ADAPTER if has_adapter else None
        self.dataloader = AnnouncedBatches(self.dataloader, self.reward_model.begin)
        self.eval_dataset = eval_dataset

    @staticmethod
    def _tokenised(dataset: Dataset, name: str, model: Any, args: Any, tokenizer: Any) -> Dataset:
        rows = tokenize_prompts(dataset, tokenizer)
        check_lengths(rows, name=name, completion_length=args.response_length, context=context_length(model.config))
        return rows

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Train; ValueError for `resume_from_checkpoint`."""
        if resume_from_checkpoint:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but TRL's PPOTrainer cannot resume from a "
                "checkpoint. Start the stage anew, or use `ppo_backend: hbat`."
            )
        set_seed(self.args.seed)  # TRL shuffles mini-batches with numpy's global generator, which it does not seed
        optimizer = self.optimizer.optimizer
        # Again, because the run may have replaced `create_scheduler` since the constructor called it.
        self.lr_scheduler = None
        self.create_scheduler(self.args.num_total_batches, optimizer)
        self.callback_handler.lr_scheduler = self.lr_scheduler
        # TRL's loop does not call the two events around an optimizer step.
        hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._fire("on_pre_optimizer_step")),
            optimizer.register_step_post_hook(lambda *_: self._fire("on_optimizer_step")),
        )
        try:
            super().train()
        finally:
            for hook in hooks:
                hook.remove()

    def _fire(self, event: str) -> None:
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the sum of both losses as `loss`, as other trainers name it."""
        if "loss/policy_avg" in logs:
            logs["loss"] = logs["loss/policy_avg"] + self.args.vf_coef * logs["loss/value_avg"]
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `hbat.PPOTrainer.evaluate`, of one data set: the mean reward alone."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None or len(given) == 0:
            raise ValueError("There are no rows to evaluate on. Pass `eval_dataset` to the trainer or to `evaluate`.")
        rows = self._tokenised(given, "eval_dataset", self.policy_model, self.args, self.processing_class)
        sampler = CompletionSampler(
            self.policy_model,
            self.processing_class,
            max_new_tokens=self.args.response_length,
            sampling={"eos_token_id": [] if self.stop_token_id is None else [self.stop_token_id]},
        )
        size, scores = self.args.per_device_eval_batch_size, []
        for start in range(0, len(rows), size):
            batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
            completions = sampler.sample([row[TOKENS] for row in batch], seed=None)
            scores.append(self.reward_model.rewards_of(batch, completions.tokens))
            self._fire("on_prediction_step")
        metrics = {f"{metric_key_prefix}_reward": float(torch.cat(scores).mean())}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _require_options(args: Any) -> None:
    own = "or use `ppo_backend: hbat`."
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"`gradient_accumulation_steps` is {args.gradient_accumulation_steps}, with which TRL's PPOTrainer takes "
            f"another number of optimizer steps than it should. Set it to 1 (a step is already a rollout), {own}"
        )
    for key in ("bf16", "fp16"):
        if getattr(args, key):
            raise ValueError(
                f"`{key}` is true, but TRL's PPOTrainer trains in the weights' precision. Set it to false, {own}"
            )
    for key in ("save_strategy", "eval_strategy"):
        value = getattr(args, key)
        if str(getattr(value, "value", value)) != "no":
            raise ValueError(
                f"`{key}` is {getattr(value, 'value', value)!r}, but TRL's PPOTrainer neither evaluates inside a "
                f"stage nor resumes from a checkpoint. Set it to 'no', {own}"
            )
    if args.max_steps > 0 and args.total_episodes is not None:
        raise ValueError("Both `max_steps` and `total_episodes` are set. Remove one.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"TRL's PPOTrainer is only supported in one process. Start one, {own}")


def _require_padding(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"The tokenizer's padding token is {tokenizer.pad_token!r}, its EOS token. TRL's PPOTrainer takes every "
            "such token for padding, also within a conversation. Give the tokenizer a `pad_token` of its own, or use "
            "`ppo_backend: hbat`."
        )
