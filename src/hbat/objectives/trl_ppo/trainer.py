"""TRL's PPOTrainer behind the constructor that stages call. Can be imported below TRL 1.13 only."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, set_seed

from hbat.model.adapters import REFERENCE_ADAPTER, add_reference_adapter
from hbat.model.copies import switch_off_dropout, unpatched_copy
from hbat.objectives.trl_ppo.models import AnnouncedBatches, RewardsAsModel, ValueModel, collate
from hbat.objectives.trl_ppo.options import require_options, require_padding
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.prompts import TOKENS, check_lengths, context_length, tokenise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental: who asks for this backend knows
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

__all__ = ["PPOConfig", "TRLPPOTrainer"]


class TRLPPOTrainer(PPOTrainer):  # type: ignore[misc]
    """TRL's PPO on prompts and reward functions, with the stage's start as reference policy.

    What differs from hbat's own trainer is TRL's: it computes in the weights' precision, clips no gradients
    (`max_grad_norm` does nothing), never checkpoints activations, cannot accumulate gradients, save or evaluate inside
    a stage, and starts a stage that was cut off anew. A step is a rollout of `per_device_train_batch_size` prompts
    with `num_ppo_epochs * num_mini_batches` updates, and always logged. Completions only end at `stop_token` or
    `stop_token_id`, which are not set unless you do.

    Args:
        model: Causal language model, with a PEFT adapter named `default` where there is one.
        args: TRL's configuration.
        train_dataset: Rows with `prompt`, a text or messages; reward functions get all other columns.
        eval_dataset: Rows to evaluate on; `eval_reward` is the mean reward of greedy completions.
        processing_class: The tokenizer, with a padding token of its own.
        callbacks: More callbacks.
        reward_funcs: As hbat's own trainer takes them.
        reward_processing_classes: Tokenizers of reward models, at the same positions.
        ref_model: A frozen reference policy; a copy of the model where left out, of the adapter where there is one.

    Raises:
        ValueError: If an option would do nothing or something wrong, or rows, tokenizer and model do not fit.
    """

    dataloader: Any
    control: Any

    def __init__(  # noqa: PLR0913 - what stages give, and rewards
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
        require_options(args)
        require_padding(processing_class)
        rewards = Rewards(reward_funcs, processing_classes=reward_processing_classes)
        rows = self._tokenised(train_dataset, "train_dataset", model, args, processing_class)
        if not isinstance(rows[0]["prompt"], str):
            rewards.require_template()
        if len(rows) < args.per_device_train_batch_size:
            raise ValueError(
                f"train_dataset has {len(rows)} rows, but a rollout takes `per_device_train_batch_size` = "
                f"{args.per_device_train_batch_size} prompts. Lower it, or give more rows."
            )
        if args.max_steps > 0:
            args.total_episodes = args.max_steps * args.per_device_train_batch_size
        value_model = ValueModel(model)  # before there is a second adapter to copy
        has_adapter = hasattr(model, "peft_config")
        if has_adapter:
            add_reference_adapter(model)
        elif ref_model is None:
            ref_model = unpatched_copy(model)
        for each in (model, ref_model):
            if each is not None:
                switch_off_dropout(each)
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
        rows = tokenise(dataset, tokenizer)
        check_lengths(rows, name=name, completion_length=args.response_length, context=context_length(model.config))
        return rows

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Train.

        Args:
            resume_from_checkpoint: Must be left out.

        Raises:
            ValueError: If it is not.
        """
        if resume_from_checkpoint:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but TRL's PPOTrainer cannot go on from a "
                "checkpoint. Start the stage anew, or use `ppo_backend: hbat`."
            )
        set_seed(self.args.seed)  # TRL shuffles mini-batches with numpy's global state, which it does not seed
        optimizer = self.optimizer.optimizer
        # Made again, because the run may have changed `create_scheduler` since the constructor called it.
        self.lr_scheduler = None
        self.create_scheduler(self.args.num_total_batches, optimizer)
        self.callback_handler.lr_scheduler = self.lr_scheduler
        # TRL's loop leaves out the two events around an optimizer step.
        hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._fire("on_pre_optimizer_step")),
            optimizer.register_step_post_hook(lambda *_: self._fire("on_optimizer_step")),
        )
        try:
            super().train()
        finally:
            for each in hooks:
                each.remove()

    def _fire(self, event: str) -> None:
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the sum of both losses, as other trainers have it, as `loss`.

        Args:
            logs: Numbers by name.
            *args: As the host passes them.
            **kwargs: As the host passes them.
        """
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
        """Complete prompts greedily and have the completions scored.

        Args:
            eval_dataset: Rows with `prompt`; the trainer's own where left out.
            ignore_keys: Nothing of interest.
            metric_key_prefix: Prefix of the metric.

        Returns:
            The mean reward.

        Raises:
            ValueError: If there are no rows.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None or len(given) == 0:
            raise ValueError("There are no rows to evaluate on. Give `eval_dataset`, to the trainer or to `evaluate`.")
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
        metrics = {f"{metric_key_prefix}_reward": float(torch.cat(scores).mean())}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def critic_of(trainer: TRLPPOTrainer) -> dict[str, Tensor]:
    """Take out what the value model has learnt.

    Args:
        trainer: A trainer.

    Returns:
        Parameters by name.
    """
    return trainer.value_model.trained()  # type: ignore[no-any-return]


def restore_critic(trainer: TRLPPOTrainer, tensors: Mapping[str, Tensor]) -> None:
    """Give a trainer the value model of another.

    Args:
        trainer: A trainer that has not trained yet.
        tensors: What `critic_of` took out.
    """
    trainer.value_model.load(tensors)
