"""How a trainer of policy and critic saves and loads: the policy as a model of its own, the rest beside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from hbat.engines.loaded_shards import is_loaded_in_shards, written_as_whole
from hbat.engines.sharded import give_back, is_sharded, shared_as, whole_state, whole_tensors
from hbat.model.adapters import ADAPTER, REFERENCE_ADAPTER, kept_form, reference_tensors
from hbat.ppo.config import PPOConfig
from hbat.ppo.networks.policy_and_critic import PolicyAndCritic
from hbat.ppo.rollouts.progress import Progress
from hbat.state.files import write_tensors

_CRITIC_FILE = "critic.safetensors"


_REFERENCE_FILE = "reference.safetensors"


_CRITIC = "critic."


_KL_COEF = "kl_coef"


class PolicyCheckpoints(Trainer):
    """A trainer whose checkpoints hold the policy as `save_pretrained` does, the critic and a rollout under way."""

    args: PPOConfig
    model: PolicyAndCritic
    processing_class: Any
    _progress: Progress

    def kept_state(self) -> dict[str, Tensor]:
        """What a later trainer of the same policy goes on from.

        Returns:
            The critic's trained tensors (not copied) and the KL coefficient, by name.
        """
        give_back(self.model.critic)
        critic = {
            f"{_CRITIC}{name}": each for name, each in self.model.critic.named_parameters() if each.requires_grad
        }
        return {**critic, _KL_COEF: torch.tensor(self._progress.kl_coef, dtype=torch.float64)}

    @torch.no_grad()
    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what another trainer kept.

        Args:
            state: What `kept_state` gave.

        Raises:
            ValueError: If it is of another critic.
        """
        own = self.kept_state()
        different = [
            name for name in own.keys() | state.keys() if name not in own or name not in state
            or own[name].shape != state[name].shape
        ]  # fmt: skip
        if different:
            raise ValueError(
                f"The critic that was kept is another one: {min(different)!r} is missing or has another shape. "
                "Set `critic` to what it was."
            )
        for name, each in own.items():
            each.copy_(shared_as(state[name], each))
        self._progress.kl_coef = float(state[_KL_COEF])

    @contextmanager
    def _policy_as_model(self) -> Iterator[Any]:
        # The host knows how to save and load models and adapters, but not a module that holds one.
        whole = self.model
        self.model = whole.policy
        try:
            yield self.model
        finally:
            self.model = whole

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder, policy = Path(str(output_dir or self.args.output_dir)), self.model.policy
        if is_loaded_in_shards(policy):
            self._save_loaded_in_shards(folder)
            return
        if not self.args.should_save:
            return
        if is_sharded(policy):  # the host has put the whole together, and writes its own files of the shards besides
            own = {
                name.removeprefix("policy."): each for name, each in state_dict.items() if name.startswith("policy.")
            }
            policy.save_pretrained(folder, state_dict=own, **_adapter_alone(policy))
            self.processing_class.save_pretrained(folder)
            return
        # Not the reference adapter: transformers 4.57 would then leave out the other one when it resumes.
        adapter = _adapter_alone(policy)
        policy.save_pretrained(folder, **adapter)
        self.processing_class.save_pretrained(folder)
        if adapter and REFERENCE_ADAPTER in policy.peft_config:
            write_tensors(folder / _REFERENCE_FILE, reference_tensors(policy))
        write_tensors(folder / _CRITIC_FILE, self.kept_state())

    def _save_loaded_in_shards(self, folder: Path) -> None:
        # Every process is here.
        policy, saves = self.model.policy, self.args.should_save
        whole = whole_state(policy, keep=saves)
        critic = whole_tensors(self.kept_state(), keep=saves)
        if saves:
            with written_as_whole(policy):
                policy.save_pretrained(folder, state_dict=whole, **_adapter_alone(policy))
            self.processing_class.save_pretrained(folder)
            write_tensors(folder / _CRITIC_FILE, critic)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing that every process writes to a checkpoint before the file that makes it whole.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        within = self.state.global_step % self.args.steps_per_rollout
        self._progress.save(Path(output_dir), self.args.process_index, mid_rollout=within > 0)
        super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if is_sharded(self.model):  # the host's files hold critic and reference adapter too
            super()._load_from_checkpoint(resume_from_checkpoint, model=self.model)
            self._progress.load(folder, self.args.process_index, self.args.device)
            return
        with self._policy_as_model() as policy, kept_form(policy):
            super()._load_from_checkpoint(resume_from_checkpoint, model=policy)
        if (folder / _REFERENCE_FILE).exists():
            with torch.no_grad():
                for name, each in load_file(folder / _REFERENCE_FILE).items():
                    reference_tensors(self.model.policy)[name].copy_(each)
        self.restore_state(load_file(folder / _CRITIC_FILE))
        self._progress.load(folder, self.args.process_index, self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the optimizer, with the critic's own learning rate where there is one.

        Args:
            *args: As the host passes them.
            **kwargs: As the host passes them.

        Returns:
            The optimizer.
        """
        existed = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        rate = self.args.critic_learning_rate
        if rate is None or existed:
            return optimizer
        own = {id(each) for each in self.model.critic.parameters()}
        for group in list(optimizer.param_groups):
            critic = [each for each in group["params"] if id(each) in own]
            group["params"] = [each for each in group["params"] if id(each) not in own]
            if critic:
                optimizer.add_param_group({**group, "params": critic, "lr": rate})
        return optimizer


def _adapter_alone(policy: Any) -> dict[str, list[str]]:
    return {"selected_adapters": [ADAPTER]} if hasattr(policy, "peft_config") else {}
