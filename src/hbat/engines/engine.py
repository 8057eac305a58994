"""What an engine does to weights, gradients and steps. The base class is one process, and DDP."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import Trainer

from hbat.config.ewc import EWCConfig
from hbat.engines.environment import forget_deepspeed
from hbat.engines.patches import Undo, after_backward
from hbat.engines.refusals import REFUSALS
from hbat.engines.sharded import shared_as

#: What `Objective.engines` can name; `ddp` stands for one process, too.
ALL_ENGINES = ("ddp", "fsdp2", "deepspeed")
#: Fields of `TrainingArguments` that say where the weights are, not what is trained.
PLACEMENT_FIELDS = ("fsdp_config",)


class Trained(Protocol):
    """What an engine must know of an objective; `engines` are those that it was tested with."""

    @property
    def name(self) -> str: ...  # noqa: D102 - the class says it
    @property
    def args(self) -> Any: ...  # noqa: D102 - the class says it
    @property
    def engines(self) -> Collection[str]: ...  # noqa: D102 - the class says it


class Local:
    """This process's share of the trained weights. Here it is the parameters themselves, with gradients in `.grad`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.weights: Mapping[str, Tensor] = parameters

    def of(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """Cut and place tensors as the weights are. Numbers and tensors of shape `()` stay whole."""
        return {name: _placed(tensors[name], weight) for name, weight in self.weights.items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Undo `of`: tensors like the parameters outside the engine. Collective where it cuts them."""
        return tensors

    def gradients(self) -> Mapping[str, Tensor]:
        """Gradients by name, complete between the last backward pass of an optimizer step and its clipping."""
        return {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}

    def take_gradients(self) -> None:
        """Put the gradients into `weights[...].grad`."""

    def release_gradients(self) -> None:
        """Take them out again: the engine uses them up in its step."""


class Engine:
    """One process or DDP: weights, gradients and optimizer state are whole on every process.

    Attributes:
        name: What `Objective.engines` calls it.
        shards: Whether it shards the model, and a reference policy with it, for the whole run.
        computes_at_once: Whether a trainer's model computes before it trains; else it is prepared only then.
        resumes_inside_stage: Whether a stage can resume from the trainer's own checkpoint.
        clips_itself: Whether gradients are clipped inside its own step instead of by accelerate.
    """

    name = "ddp"
    shards = False
    computes_at_once = True
    resumes_inside_stage = True
    clips_itself = False

    def check(self, tracks: Sequence[Trained], ewc: EWCConfig | None) -> None:
        """Refuse what was not tested with this engine, and (ValueError) objectives that ask for different ones."""

    def refuse_untested(self, track: Trained, *, optimizer_is_tested: Callable[[str], bool]) -> None:
        """Refuse an objective and options of its trainer that no engine but the base class supports."""
        args = track.args
        optimizer = str(getattr(args.optim, "value", args.optim))
        refused = {
            "untested objective": self.name not in track.engines,
            "untested optimizer": not optimizer_is_tested(optimizer),
            "precomputed reference": getattr(args, "precompute_ref_log_probs", False),
            "compilation": args.torch_compile,
        }
        for what, asked in refused.items():
            if asked:
                raise REFUSALS[what].error(objective=track.name, optimizer=optimizer, engine=self.name)

    def check_penalty(self, *, method: str, bound: bool) -> None:
        """Refuse an `EWCCallback` that cannot act; `bound` says whether it is bound to a trainer."""

    def place(self, model: nn.Module, reference: nn.Module | None) -> None:
        """Shard model and reference policy in place, once for the run."""

    @contextmanager
    def stage(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Around a stage: afterwards every model is whole on every process and in its own precision."""
        yield

    @contextmanager
    def building(self, args: Any, *, evaluating: bool) -> Iterator[dict[str, Any]]:
        """Around a trainer's construction: yields changes of its arguments `args`."""
        forget_deepspeed()  # transformers remembers the last configuration, also one built for another purpose
        # No stage could resume from its checkpoints; snapshots of the weights alone are for the user.
        yield {} if self.resumes_inside_stage or args.save_only_model else {"save_strategy": "no"}

    def adapt(self, trainer: Trainer) -> None:
        """Patch a trainer that was just built with what this engine needs."""

    def gather(self, model: nn.Module) -> None:
        """Make a model whole on every process. Collective: call on every rank."""

    def local(self, parameters: Mapping[str, nn.Parameter]) -> Local:
        """This process's share of trained parameters, once the trainer has prepared its model."""
        return Local(parameters)

    def before_clipping(self, trainer: Trainer, action: Callable[[], None]) -> Undo:
        """Run `action` on complete gradients, before they are clipped and stepped, until undone."""
        accelerator: Any = trainer.accelerator

        def at_last_micro_step(_: Tensor) -> None:
            if accelerator.sync_gradients:
                action()

        return after_backward(accelerator, at_last_micro_step)

    def keeps_precision(self, trainer: Trainer) -> bool:
        """Whether the trainer leaves weights in the precision in which it was given them."""
        return True

    def optimizer_state(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
        """State of a torch optimizer by parameter name, whole tensors. Collective where the state is cut."""
        return {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}

    def load_optimizer_state(
        self, optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Give an optimizer that has not stepped yet the state of another; learning rates stay its own."""
        state = optimizer.state_dict()
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        number_of = {id(parameter): number for parameter, number in zip(order, numbers, strict=True)}
        state["state"] = {
            number_of[id(parameter)]: saved[name]
            for name, parameter in parameters.items()
            if name in saved and id(parameter) in number_of
        }
        optimizer.load_state_dict(state)


def _placed(tensor: Any, weight: Tensor) -> Any:
    return shared_as(tensor, weight).to(weight.device) if isinstance(tensor, Tensor) else tensor
