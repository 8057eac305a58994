"""Checkpoints: the policy as `save_pretrained` writes it, beside it the critic and the state of a rollout."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from hbat.model.adapters import ADAPTER, REFERENCE_ADAPTER, kept_form, reference_parameters
from hbat.model.load import damage_named
from hbat.ppo.config import PPOConfig
from hbat.ppo.engine import give_back, is_sharded, shared_as, whole_weights, written_as_whole
from hbat.ppo.networks.policy_and_critic import PolicyAndCritic
from hbat.ppo.rollouts.rollout import Rollout
from hbat.state.files import write_json, write_tensors

_CRITIC_FILE = "critic.safetensors"
_REFERENCE_FILE = "reference.safetensors"
_STATE_FILE = "ppo_state.json"
_CRITIC = "critic."
_KL_COEF = "kl_coef"


@dataclass
class Progress:
    """PPO's state between optimizer steps, beside the weights."""

    kl_coef: float
    skips: bool = False  # whether the rollout's remaining updates are skipped
    entries: dict[str, list[float]] = field(default_factory=dict)  # to log
    rollout: Rollout | None = None  # the one that is trained on

    def note(self, values: Mapping[str, float]) -> None:
        """Collect values for the next log entry."""
        for name, value in values.items():
            self.entries.setdefault(name, []).append(value)

    def take_entries(self) -> dict[str, float]:
        """Means of what was collected since the last call; times are summed."""
        entries, self.entries = self.entries, {}
        return {
            name: sum(values) if name.startswith("seconds/") else sum(values) / len(values)
            for name, values in entries.items()
        }

    def save(self, folder: Path, process: int, *, mid_rollout: bool) -> None:
        """Write to a checkpoint; each process has its own rollout, which is needed `mid_rollout` alone."""
        if mid_rollout and self.rollout is not None:
            self.rollout.save(folder / f"rollout_{process}.safetensors")
        if process == 0:
            write_json(folder / _STATE_FILE, {"kl_coef": self.kl_coef, "skips": self.skips, "entries": self.entries})

    def load(self, folder: Path, process: int, device: Any) -> None:
        """Read from a checkpoint."""
        values = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        self.kl_coef, self.skips, self.entries = values["kl_coef"], values["skips"], values["entries"]
        file = folder / f"rollout_{process}.safetensors"
        self.rollout = Rollout.load(file, device) if file.exists() else None


class PolicyCheckpoints(Trainer):
    """A trainer of policy and critic that saves and resumes both."""

    args: PPOConfig
    model: PolicyAndCritic
    processing_class: Any
    _progress: Progress

    def kept_state(self) -> dict[str, Tensor]:
        """The critic's trained tensors (not copied) and the KL coefficient, for the policy's next trainer."""
        give_back(self.model.critic)
        critic = {
            f"{_CRITIC}{name}": parameter
            for name, parameter in self.model.critic.named_parameters()
            if parameter.requires_grad
        }
        return {**critic, _KL_COEF: torch.tensor(self._progress.kl_coef, dtype=torch.float64)}

    @torch.no_grad()
    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Start from the `kept_state` of another trainer; ValueError if its critic is another one."""
        own = self.kept_state()
        different = [
            name for name in own.keys() | state.keys() if name not in own or name not in state
            or own[name].shape != state[name].shape
        ]  # fmt: skip
        if different:
            raise ValueError(
                f"The saved critic does not fit: {min(different)!r} is missing or has another shape. Set `critic` to "
                "what it was."
            )
        for name, tensor in own.items():
            tensor.copy_(shared_as(state[name], tensor))
        self._progress.kl_coef = float(state[_KL_COEF])

    def continue_critic(self, folder: str) -> None:
        """Start from the critic beside a policy that a PPOTrainer saved; warns if there is one that is not read."""
        file = Path(folder) / _CRITIC_FILE
        if not folder or not file.is_file():
            return
        reason = "`critic_model_name_or_path` names another."
        if self.args.critic_model_name_or_path is None:
            with damage_named(file, "critic"):
                state = load_file(file)
            try:
                self.restore_state(state | {_KL_COEF: self.kept_state()[_KL_COEF]})
            except ValueError as error:
                reason = str(error)
            else:
                return
        warnings.warn(f"The critic {str(file)!r} is not read: {reason}", stacklevel=3)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder, policy = Path(str(output_dir or self.args.output_dir)), self.model.policy
        saves = self.args.should_save
        weights, critic = whole_weights(policy, self.kept_state(), state_dict, keep=saves)
        if not saves:
            return
        # Not the reference adapter: transformers 4.57 would then skip the other one when it resumes.
        adapter = {"selected_adapters": [ADAPTER]} if hasattr(policy, "peft_config") else {}
        with written_as_whole(policy):
            policy.save_pretrained(folder, state_dict=weights, **adapter)
        self.processing_class.save_pretrained(folder)
        if weights is None and adapter and REFERENCE_ADAPTER in policy.peft_config:
            write_tensors(folder / _REFERENCE_FILE, reference_parameters(policy))
        if critic is not None:
            write_tensors(folder / _CRITIC_FILE, critic)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing that every process writes to a checkpoint before the file that completes it.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        within = self.state.global_step % self.args.steps_per_rollout
        self._progress.save(Path(output_dir), self.args.process_index, mid_rollout=within > 0)
        super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if is_sharded(self.model):  # transformers' own files hold critic and reference adapter too
            super()._load_from_checkpoint(resume_from_checkpoint, model=self.model)
        else:
            whole = self.model
            self.model = whole.policy  # transformers loads models and adapters, but not a module that holds one
            try:
                with kept_form(self.model):
                    super()._load_from_checkpoint(resume_from_checkpoint, model=self.model)
            finally:
                self.model = whole
            if (folder / _REFERENCE_FILE).exists():
                with torch.no_grad():
                    for name, tensor in load_file(folder / _REFERENCE_FILE).items():
                        reference_parameters(self.model.policy)[name].copy_(tensor)
            self.restore_state(load_file(folder / _CRITIC_FILE))
        self._progress.load(folder, self.args.process_index, self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the optimizer, with `critic_learning_rate` for the critic's own parameters if it is set."""
        existed = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        rate = self.args.critic_learning_rate
        if rate is None or existed:
            return optimizer
        own = {id(parameter) for parameter in self.model.critic.parameters()}
        for group in list(optimizer.param_groups):
            critic = [parameter for parameter in group["params"] if id(parameter) in own]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            if critic:
                optimizer.add_param_group({**group, "params": critic, "lr": rate})
        return optimizer
