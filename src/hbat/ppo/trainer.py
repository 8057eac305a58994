"""PPOTrainer: proximal policy optimization on `transformers.Trainer`."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hbat.config.fields import at_home
from hbat.model.copies import switch_off_dropout
from hbat.ppo.checkpoints import PolicyCheckpoints, Progress
from hbat.ppo.config import PPOConfig
from hbat.ppo.engine import shard
from hbat.ppo.maths import adapted_kl_coef, masked_mean, policy_loss, value_loss
from hbat.ppo.networks.policy_and_critic import PolicyAndCritic, build_critic
from hbat.ppo.networks.reference import Reference
from hbat.ppo.requirements import prepare, prepare_rows
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.collector import RolloutCollector
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.rollout import Rollout
from hbat.ppo.rollouts.schedule import Position, RolloutSchedule

_APPROX_KL = "update/approx_kl"


class PPOTrainer(PolicyCheckpoints):
    r"""Trains a policy on rewards of its own completions by PPO (arXiv 1707.06347, 1909.08593).

    A rollout samples a completion for each prompt, scores it, and is trained on for several epochs of mini-batches:
    clipped surrogate, clipped value loss, GAE, and in each token's reward a KL penalty to the reference policy, which
    is the model as it is when the trainer is built. The score is the reward of a completion's last token. Losses are
    means over the tokens of an optimizer step, whatever its micro-batches and processes. Everything else (clipping,
    accumulation, precision, checkpoints, callbacks, logs) is `transformers.Trainer`'s; an interrupted run resumes
    exactly, also in the middle of a rollout.

    Args:
        model: Causal language model, with a PEFT adapter named `default` if it has one, or its name or path, also of
            an adapter's folder.
        args: The options.
        train_dataset: Rows with `prompt`, a text or messages; reward functions receive all other columns.
        eval_dataset: Rows to evaluate on; `eval_reward` is the mean reward of greedy completions.
        processing_class: The tokenizer; by default the model's own.
        reward_funcs: One or several of: a function `f(prompts, completions, completion_ids, **columns)`, also an async
            one, that returns a number per completion; a sequence classification model, or its name or path.
        reward_processing_classes: Tokenizers of reward models, at the same positions.
        ref_model: A frozen reference policy instead of a copy of the model; not with an adapter, which is copied.
        peft_config: Configuration of a new adapter.
        callbacks: Additional callbacks.
        optimizers: Optimizer and scheduler instead of those that `args` describe.

    Raises:
        ValueError: If model, tokenizer, rows and options do not fit each other.
        RewardError: If a reward needs a column that the rows lack.
        NotImplementedError: For what `docs/support.md` lists as not supported.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the constructor of TRL's trainers
        self,
        model: Any,
        args: PPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: Any = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        ref_model: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        model, reward_funcs = at_home(model), at_home(reward_funcs)
        policy, tokenizer, prompts = prepare(model, args, train_dataset, processing_class, peft_config)
        rewards = Rewards(reward_funcs, weights=args.reward_weights, processing_classes=reward_processing_classes)
        evaluation = prepare_rows(eval_dataset, policy, tokenizer, args)
        rewards.require(prompts, evaluation)
        self.rewards = rewards
        super().__init__(
            model=PolicyAndCritic(policy, build_critic(args.critic, policy, args.critic_model_name_or_path)),
            args=args,
            data_collator=_collate_nothing,
            train_dataset=prompts,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # transformers then divides by the number of micro-batches
        switch_off_dropout(self.model)
        rewards.to(args.device)
        reference = Reference(policy, ref_model) if args.kl_coef > 0 else None
        self.ref_model = None if reference is None else reference.model
        shard(self, self.ref_model)
        self.model.tokens.verify()
        if reference is not None:
            reference.tokens.verify()
        sampler = CompletionSampler(
            policy,
            tokenizer,
            max_new_tokens=args.max_completion_length,
            sampling=args.sampling,
            batch_size=args.generation_batch_size,
        )
        self._collector = RolloutCollector(self.model, reference, rewards, sampler, tokenizer, args, self.accelerator)
        self._schedule = RolloutSchedule.of_training(args, len(prompts))
        self._progress = Progress(args.kl_coef)
        self._micro_step: int | None = None
        self._update: dict[str, Tensor] = {}
        by_name = isinstance(model, str | Path)
        self.continue_critic(str(model) if by_name else policy.config._name_or_path)  # noqa: SLF001 - no public name

    @property
    def policy(self) -> Any:
        """The trained model without the critic."""
        return self.model.policy

    def get_train_dataloader(self) -> DataLoader[int]:
        """A loader of as many empty batches as an epoch has micro-steps: rollouts choose their prompts themselves."""
        self._micro_step = None
        return DataLoader(
            range(self._schedule.micro_steps_per_epoch),  # type: ignore[arg-type]
            collate_fn=_collate_nothing,
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train on one micro-batch, making a rollout first if one is due; 0 if updates are skipped (`target_kl`)."""
        if self._micro_step is None:  # the first of a `train()`, which may resume from a checkpoint
            self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        position = self._schedule.position(self._micro_step)
        self._micro_step += 1
        if position.begins_rollout:
            self._make_rollout(position.rollout)
        if self._progress.skips:
            # Without gradients the optimizer changes nothing.
            return torch.zeros((), device=self.args.device)
        start = time.perf_counter()
        loss = super().training_step(model, self._micro_batch(position))
        self._progress.note({"seconds/update": time.perf_counter() - start})
        if position.micro_batch == self.args.gradient_accumulation_steps - 1:
            self._end_update()
        return loss

    def _make_rollout(self, number: int) -> None:
        progress, args = self._progress, self.args
        columns = self.train_dataset[self._schedule.prompt_indices(number)]  # type: ignore[index]
        progress.rollout, metrics = self._collector.collect(
            [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
            seed=self._schedule.sampling_seed(number),
            kl_coef=progress.kl_coef,
            trainer_state=self.state,
        )
        progress.skips = False
        progress.note(metrics)
        if args.adaptive_kl:
            progress.kl_coef = adapted_kl_coef(
                progress.kl_coef,
                metrics["kl"],
                target=args.kl_target,
                horizon=args.kl_horizon,
                samples=args.rollout_size * args.world_size,
            )

    def _micro_batch(self, position: Position) -> dict[str, Any]:
        rollout = self._progress.rollout
        if rollout is None:
            raise RuntimeError(
                f"Training resumes in the middle of rollout {position.rollout}, which the checkpoint does not hold. "
                "Resume with the batch sizes and the number of processes that it was written with."
            )
        rows = self._schedule.row_indices(position)
        count = self._collector.total(rollout.completion_mask[rows.flatten().to(rollout.values.device)].sum().float())
        return {"rollout": rollout.select(rows[position.micro_batch]), "count": count}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a micro-batch, scaled so that the mean over micro-batches and processes is the step's loss."""
        args, rollout = self.args, inputs["rollout"]
        tokens = rollout.completion_ids.shape[1]
        with_entropy = args.entropy_coef > 0
        outputs = model(rollout.input_ids, rollout.attention_mask, tokens, args.temperature, with_entropy=with_entropy)
        loss, shares = update_loss(outputs, rollout, inputs["count"], args)
        for name, share in shares.items():
            self._update[name] = self._update.get(name, torch.zeros_like(share)) + share
        loss = loss * (args.gradient_accumulation_steps * args.world_size)
        return (loss, None) if return_outputs else loss

    def _end_update(self) -> None:
        update, self._update = self._update, {}
        values = self._collector.total(torch.stack(list(update.values()))).tolist()
        noted = dict(zip(update, values, strict=True))
        target = self.args.target_kl
        self._progress.skips = target is not None and noted[_APPROX_KL] > target
        if target is not None:
            noted["update/stopped"] = float(self._progress.skips)
        self._progress.note(noted)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; an entry with a training loss also gets what PPO collected since the last one."""
        if "loss" in logs:
            logs |= self._progress.take_entries()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Complete prompts greedily and score the completions.

        Args:
            eval_dataset: Rows with `prompt`, or several such data sets by name; by default the trainer's own.
            ignore_keys: Unused.
            metric_key_prefix: Prefix of the metrics.

        Returns:
            `eval_reward`, its standard deviation, each function's mean, and lengths.

        Raises:
            ValueError: If there are no rows, or a prompt is too long.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, Mapping):
            results: dict[str, float] = {}
            for name, dataset in rows.items():
                results |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return results
        if rows is None or len(rows) == 0:
            raise ValueError("There are no rows to evaluate on. Pass `eval_dataset` to the trainer or to `evaluate`.")
        prompts = prepare_rows(rows, self.policy, self.processing_class, self.args)
        after = partial(self.callback_handler.on_prediction_step, self.args, self.state, self.control)
        found = self._collector.evaluate(prompts, self.state, after)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported."""
        raise NotImplementedError("PPO has no predictions. Use `evaluate`, or `policy.generate` for completions.")


def update_loss(
    outputs: tuple[Tensor, Tensor, Tensor], rollout: Rollout, count: Tensor, args: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's share of the mean loss over all `count` tokens of its optimizer step.

    Returns:
        policy loss + `vf_coef` * value loss - `entropy_coef` * entropy, a scalar tensor; and shares to log, which add
        up to the means over the optimizer step.
    """
    log_probs, entropies, values = outputs
    mask = rollout.completion_mask
    surrogate = policy_loss(log_probs, rollout.log_probs, rollout.advantages, args.cliprange)
    of_policy = masked_mean(surrogate, mask, count)
    of_critic = masked_mean(value_loss(values, rollout.values, rollout.returns, args.cliprange_value), mask, count)
    entropy = masked_mean(entropies, mask, count)
    loss = of_policy + args.vf_coef * of_critic - args.entropy_coef * entropy
    log_ratio = log_probs.detach() - rollout.log_probs
    ratio = torch.exp(log_ratio)
    return loss, {
        # transformers' own mean forgets the steps between the last log entry and the checkpoint it resumes from.
        "loss": loss.detach(),
        "loss/policy": of_policy.detach(),
        "loss/value": of_critic.detach(),
        **({"entropy": entropy.detach()} if args.entropy_coef > 0 else {}),
        _APPROX_KL: masked_mean(ratio - 1.0 - log_ratio, mask, count),
        "update/ratio": masked_mean(ratio, mask, count),
        "update/clipped": masked_mean(((ratio - 1.0).abs() > args.cliprange).float(), mask, count),
    }


def _collate_nothing(items: Any) -> dict[str, Any]:  # noqa: ARG001 - a collator
    return {}
