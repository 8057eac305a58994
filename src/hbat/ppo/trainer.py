"""PPOTrainer: proximal policy optimisation on `transformers.Trainer`."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hbat.model.copies import switch_off_dropout
from hbat.ppo.checkpoints import PolicyCheckpoints
from hbat.ppo.config import PPOConfig
from hbat.ppo.fsdp2 import refuse_critic, shard_critic, shard_policy_and_critic
from hbat.ppo.maths import adapted_kl_coef
from hbat.ppo.networks.policy_and_critic import PolicyAndCritic, build_critic
from hbat.ppo.networks.reference import Reference
from hbat.ppo.requirements import prepare, prepare_rows
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.collector import RolloutCollector
from hbat.ppo.rollouts.evaluation import evaluate_policy
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.progress import Progress
from hbat.ppo.rollouts.schedule import Position, RolloutSchedule
from hbat.ppo.update import APPROX_KL, update_loss


class PPOTrainer(PolicyCheckpoints):
    r"""Trains a policy on rewards of its own completions by PPO (arXiv 1707.06347, 1909.08593).

    A rollout samples a completion for each prompt, has it scored, and is trained on in several passes of mini-batches:
    clipped surrogate, clipped value loss, GAE, and in each token's reward a KL penalty to the reference policy, which
    is the model as it is when the trainer is built. The score falls on a completion's last token. Losses are means
    over the tokens of a mini-batch, whatever its micro-batches and processes are. Everything else (clipping,
    accumulation, precision, checkpoints, callbacks, logs) is `transformers.Trainer`'s; a run that is cut off resumes
    exactly, also in the middle of a rollout.

    Args:
        model: Causal language model, with a PEFT adapter named `default` where there is one, or its name or path.
        args: The options.
        train_dataset: Rows with `prompt`, a text or messages; reward functions get all other columns.
        eval_dataset: Rows to evaluate on; `eval_reward` is the mean reward of greedy completions.
        processing_class: The tokenizer; the model's own where left out.
        reward_funcs: One or several of: a function `f(prompts, completions, completion_ids, **columns)` that returns a
            number for each completion, also an async one; a sequence classification model, or its name or path.
        reward_processing_classes: Tokenizers of reward models, at the same positions.
        ref_model: A frozen reference policy instead of a copy of the model; not with an adapter, which is copied.
        peft_config: Configuration of a new adapter.
        callbacks: More callbacks.
        optimizers: Optimizer and scheduler instead of those that `args` describe.

    Raises:
        ValueError: If model, tokenizer, rows and options do not fit each other.
        NotImplementedError: With what `docs/support.md` says is not supported.
    """

    _tag_names = ("hbat", "ppo")

    def __init__(  # noqa: PLR0913, PLR0917 - the constructor that TRL's trainers have
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
        policy, tokenizer, prompts = prepare(model, args, train_dataset, processing_class, peft_config)
        refuse_critic(args.critic, policy)
        rewards = Rewards(reward_funcs, weights=args.reward_weights, processing_classes=reward_processing_classes)
        if not isinstance(prompts[0]["prompt"], str):
            rewards.require_template()
        super().__init__(
            model=PolicyAndCritic(policy, build_critic(args.critic, policy, args.critic_model_name_or_path)),
            args=args,
            data_collator=_nothing,
            train_dataset=prompts,
            eval_dataset=prepare_rows(eval_dataset, policy, tokenizer, args),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # the host divides by the number of micro-batches
        switch_off_dropout(self.model)
        rewards.to(args.device)
        reference = Reference(policy, ref_model) if args.kl_coef > 0 else None
        self.ref_model = None if reference is None else reference.model
        if self.is_fsdp_enabled:
            shard_policy_and_critic(self, reference)
        shard_critic(policy, self.model.critic)
        for each in (self.model.tokens, reference):
            if each is not None:
                each.verify()
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

    @property
    def policy(self) -> Any:
        """The model that is trained, without the critic."""
        return self.model.policy

    def get_train_dataloader(self) -> DataLoader[int]:
        """Count micro-steps: rollouts know by themselves which prompts they take.

        Returns:
            A loader of as many items as one pass over the prompts has micro-steps.
        """
        self._micro_step = None
        return DataLoader(range(self._schedule.micro_steps_per_epoch), collate_fn=_nothing)  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take a micro-step, making a rollout first where one is due.

        Args:
            model: Policy and critic, wrapped by the host.
            inputs: Nothing of interest.
            num_items_in_batch: Nothing of interest.

        Returns:
            The loss; zero where the rollout's remaining updates are skipped.
        """
        if self._micro_step is None:  # the first of a `train()`, which may go on from a checkpoint
            self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        position = self._schedule.position(self._micro_step)
        self._micro_step += 1
        if position.begins_rollout:
            self._make_rollout(position.rollout)
        if self._progress.skips:
            # Without gradients the optimizer changes nothing.
            return torch.zeros((), device=self.args.device)
        begun = time.perf_counter()
        loss = super().training_step(model, self._micro_batch(position))
        self._progress.note({"seconds/update": time.perf_counter() - begun})
        if position.part == self.args.gradient_accumulation_steps - 1:
            self._end_update()
        return loss

    def _make_rollout(self, number: int) -> None:
        progress, args = self._progress, self.args
        rows = self.train_dataset[self._schedule.prompt_indices(number)]  # type: ignore[index]
        progress.rollout, metrics = self._collector.collect(
            _as_rows(rows),
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
                f"Training goes on in the middle of rollout {position.rollout}, which the checkpoint does not hold. "
                "Resume with the batch sizes and the number of processes with which it was written."
            )
        rows = self._schedule.row_indices(position)
        count = self._collector.total(rollout.completion_mask[rows.flatten().to(rollout.values.device)].sum().float())
        return {"rollout": rollout.select(rows[position.part]), "count": count}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a micro-batch: its share of the mean over all tokens of the optimizer step.

        Args:
            model: Policy and critic, wrapped by the host.
            inputs: The micro-batch, and the number of tokens of the optimizer step.
            return_outputs: Whether a second value is returned, which is None.
            num_items_in_batch: Nothing of interest.

        Returns:
            The loss, scaled so that the host's mean over micro-batches and processes is the sum of shares.
        """
        args, part = self.args, inputs["rollout"]
        tokens = part.completion_ids.shape[1]
        with_entropy = args.entropy_coef > 0
        outputs = model(part.input_ids, part.attention_mask, tokens, args.temperature, with_entropy=with_entropy)
        loss, shares = update_loss(outputs, part, inputs["count"], args)
        for name, share in shares.items():
            self._update[name] = self._update.get(name, torch.zeros_like(share)) + share
        loss = loss * (args.gradient_accumulation_steps * args.world_size)
        return (loss, None) if return_outputs else loss

    def _end_update(self) -> None:
        update, self._update = self._update, {}
        names = list(update)
        values = self._collector.total(torch.stack([update[name] for name in names])).tolist()
        noted = dict(zip(names, values, strict=True))
        target = self.args.target_kl
        self._progress.skips = target is not None and noted[APPROX_KL] > target
        if target is not None:
            noted["update/stopped"] = float(self._progress.skips)
        self._progress.note(noted)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what PPO has noted since the last time beside a training loss.

        Args:
            logs: Numbers by name.
            *args: As the host passes them.
            **kwargs: As the host passes them.
        """
        if "loss" in logs:
            logs |= self._progress.taken()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Complete prompts greedily and have the completions scored.

        Args:
            eval_dataset: Rows with `prompt`, or several such data sets by name; the trainer's own where left out.
            ignore_keys: Nothing of interest.
            metric_key_prefix: Prefix of the metrics.

        Returns:
            `eval_reward`, its spread over completions, each function's mean, and lengths.

        Raises:
            ValueError: If there are no rows.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, Mapping):
            results: dict[str, float] = {}
            for name, each in rows.items():
                results |= self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}")
            return results
        found = evaluate_policy(self._collector, rows, self.policy, self.processing_class, self.args, self.state)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: PPO has no outputs beside completions.

        Args:
            *args: Nothing of interest.
            **kwargs: Nothing of interest.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("PPO predicts nothing. Use `evaluate`, or `policy.generate` for completions.")


def _nothing(items: Any) -> dict[str, Any]:  # noqa: ARG001 - a collator
    return {}


def _as_rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
