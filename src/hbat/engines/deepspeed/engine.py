"""DeepSpeed as an engine: gradients, weights and optimizer state belong to it within a stage, and to us between."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import Trainer

from hbat.config.ewc import EWCConfig
from hbat.engines.deepspeed import flat, zero3, zero12
from hbat.engines.deepspeed.bf16 import FullPrecision, engine_of, rounds_weights
from hbat.engines.deepspeed.request import deepspeed_config, is_asked, left_aside
from hbat.engines.engine import Engine, Local, Trained
from hbat.engines.patches import Undo, before_engine_step, without_empty_groups
from hbat.engines.refusals import REFUSALS

#: Optimizers whose state holds tensors like the weights, and numbers: what a stage can hand to the next one.
_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"}


class DeepSpeed(Engine):
    """ZeRO-1, -2 and -3 without offload."""

    name = "deepspeed"
    computes_at_once = False
    resumes_inside_stage = False  # its checkpoints hold an engine, and every stage makes its own
    clips_itself = True

    def __init__(self) -> None:
        self._precision = FullPrecision([])
        self._trainer: Any = None

    def check(self, tracks: Sequence[Trained], ewc: EWCConfig | None) -> None:
        """See `Engine`."""
        asked = [track for track in tracks if is_asked(track.args)]
        for track in asked:
            self.refuse_untested(track, optimizer_is_tested=_OPTIMIZERS.__contains__)
            config = deepspeed_config(track.args)
            if owned := [key for key in ("optimizer", "scheduler") if config.get(key)]:
                raise REFUSALS["optimizer by DeepSpeed"].error(owned=owned)
        if len(asked) < len(tracks):
            raise REFUSALS["DeepSpeed for some objectives"].error(names=sorted(track.name for track in asked))
        if ewc is not None:
            self.check_penalty(method=ewc.method, bound=True)
        if ewc is not None and ewc.freeze:
            raise REFUSALS["frozen tensors under DeepSpeed"].error()

    def check_penalty(self, *, method: str, bound: bool) -> None:
        """See `Engine`."""
        if method == "proximal":
            raise REFUSALS["proximal steps under DeepSpeed"].error()
        if not bound:
            raise REFUSALS["EWCCallback alone under DeepSpeed"].error()

    @contextmanager
    def stage(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """See `Engine`."""
        self._precision = FullPrecision(models)
        try:
            yield
        finally:
            if self._trainer is not None:
                self._trainer.deepspeed = self._trainer = None  # the engine, whose memory is freed with it
            for model in models:
                zero12.release(model)
            self._precision.give_back()

    @contextmanager
    def building(self, args: Any, *, evaluating: bool) -> Iterator[dict[str, Any]]:
        """See `Engine`."""
        aside: AbstractContextManager[dict[str, Any]] = left_aside(args) if evaluating else nullcontext({})
        with super().building(args, evaluating=evaluating) as changes, aside as more:
            yield changes | more

    def adapt(self, trainer: Trainer) -> None:
        """See `Engine`."""
        self._trainer = trainer
        if trainer.is_deepspeed_enabled:  # not where it is left aside
            without_empty_groups(trainer)
        self._precision.attach(trainer)

    def gather(self, model: nn.Module) -> None:
        """See `Engine`."""
        zero3.gather(model)

    def local(self, parameters: Mapping[str, nn.Parameter]) -> Local:
        """See `Engine`."""
        partitioned = any(map(zero3.is_partitioned, parameters.values()))
        return zero3.Partitions(parameters) if partitioned else zero12.Fragments(parameters)

    def before_clipping(self, trainer: Trainer, action: Callable[[], None]) -> Undo:
        """See `Engine`."""
        return before_engine_step(engine_of(trainer.accelerator), action)

    def keeps_precision(self, trainer: Trainer) -> bool:
        """See `Engine`."""
        return not rounds_weights(trainer)

    def optimizer_state(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
        """See `Engine`."""
        zero = zero3 if zero3.is_zero3(optimizer) else zero12
        return flat.state_of(optimizer.optimizer, zero.slots(optimizer, parameters))

    def load_optimizer_state(
        self, optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """See `Engine`."""
        if not zero3.is_zero3(optimizer):
            flat.load_state(optimizer.optimizer, zero12.slots(optimizer, parameters), saved)
            return
        with zero3.flat_groups(optimizer):
            flat.load_state(optimizer.optimizer, zero3.slots(optimizer, parameters), saved)
