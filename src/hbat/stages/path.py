"""PathIntegral: when the path integral of a stage's loss is accumulated, saved and resumed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hbat.engines.checks import policy_of
from hbat.engines.engine import Engine, Local
from hbat.engines.processes import is_main_process
from hbat.engines.sharded import whole_tensors
from hbat.ewc.parameters import trainable_parameters
from hbat.ewc.path import add_path_
from hbat.state.files import write_tensors

_FILE = "path_integral.safetensors"


class PathIntegral(TrainerCallback):
    """Accumulates the path integral of one stage: see `hbat.ewc.add_path_`.

    Args:
        trainer: The stage's trainer, before anything else adds to its gradients.
        engine: The engine of the run.
        anchor: Weights at the stage's start, by parameter name.
        checkpoint: Folder of the checkpoint from which the stage resumes, if it does.
        timing: Times what is added to every step.

    Attributes:
        total: The path integral by parameter name, on the CPU, once training has ended.
    """

    def __init__(
        self,
        trainer: Trainer,
        engine: Engine,
        anchor: Mapping[str, Tensor],
        checkpoint: str | None,
        timing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.total: Mapping[str, Tensor] = {}
        self._trainer = trainer
        self._engine = engine
        self._start = anchor
        self._checkpoint = checkpoint
        self._timing = timing
        self._local = Local({})
        self._anchor: Mapping[str, Tensor] = {}
        self._path: Mapping[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin at zero, or with what the checkpoint has."""
        self._local = local = self._engine.local(trainable_parameters(policy_of(model)))
        self._anchor = local.of(self._start)
        if self._checkpoint is None:
            self._path = {
                name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in local.weights.items()
            }
        else:
            self._path = local.of(load_file(Path(self._checkpoint) / _FILE))
        self._engine.before_clipping(self._trainer, self._before_step)

    def _before_step(self) -> None:
        with self._timing():
            self._finish_step()  # TRL's PPO takes several optimizer steps between two `on_step_end`
            # The optimizer steps on gradients that are clipped and hold the penalty, so the task's own are copied. A
            # loss scale is divided out; where it has overflowed, the step is skipped and contributes nothing.
            scaler = self._trainer.accelerator.scaler
            for name, gradient in self._local.gradients().items():
                if scaler is None:
                    self._gradients[name] = self._copy(name, gradient.detach())
                else:
                    self._gradients[name] = (gradient.detach() / scaler.get_scale()).nan_to_num_(0.0, 0.0, 0.0)
            self._add(after_step=False)

    def _copy(self, name: str, gradient: Tensor) -> Tensor:
        # On a CPU a first write to new memory costs more than the copy itself; of a GPU, torch keeps freed memory.
        if gradient.device.type != "cpu":
            return gradient.clone()
        if name not in self._kept:
            self._kept[name] = torch.empty_like(gradient)
        return self._kept[name].copy_(gradient)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the other side of the step, with all that has changed the weights."""
        with self._timing():
            self._finish_step()

    def _finish_step(self) -> None:
        self._add(after_step=True)
        self._gradients = {}

    def _add(self, *, after_step: bool) -> None:
        add_path_(self._path, self._local.weights, self._anchor, self._gradients, after_step=after_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write what there is so far into the checkpoint. Collective where weights are cut."""
        whole = whole_tensors(self._local.restored(self._path), keep=is_main_process())
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if whole and folder.is_dir():
            write_tensors(folder / _FILE, whole)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the total, and release the trainer's tensors."""
        self.total = {name: tensor.cpu() for name, tensor in self._local.restored(self._path).items()}
        self._local, self._path, self._anchor, self._kept = Local({}), {}, {}, {}
