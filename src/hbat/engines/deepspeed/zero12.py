"""What of a model lies on this process under DeepSpeed's ZeRO-1 and -2: fragments of weights and gradients.

Each process holds the whole model to compute with, and of one long row of all trained weights a piece, which its
optimizer steps. A fragment is what the piece has of a parameter: possibly a part, possibly nothing. Between stages
nothing of this is left. `_hp_mapping` and `_index_in_param_group` are private names of DeepSpeed's (0.19); its public
functions move each tensor as a whole between the processes, twice a step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

#: What DeepSpeed leaves on parameters.
_LEFT = (
    "_hp_mapping", "_index_in_param_group", "_dp_group", "_zero_optimizer", "get_full_hp_param", "get_full_hp_grad",
    "set_full_hp_param", "set_full_hp_grad", "load_hp_checkpoint_state", "grad_accum", "param_idx_in_group",
)  # fmt: skip


def engine_of(accelerator: Any) -> Any:
    """Find the engine that a trainer trains with.

    Args:
        accelerator: The trainer's accelerator, once it has prepared the model.

    Returns:
        DeepSpeed's engine; None under any other.
    """
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)


def before_step(engine: Any, action: Callable[[], None]) -> Callable[[], None]:
    """Run `action` before each optimizer step of an engine, on complete gradients and before they are clipped.

    `accelerator.backward` takes the step already, so that nothing can be done after it, or on
    `on_pre_optimizer_step`.

    Args:
        engine: DeepSpeed's engine.
        action: Called at the end of the last micro-step.

    Returns:
        A function that takes the action out again; calling it twice does no harm.
    """
    take_step, active = engine.step, True

    def step(*args: Any, **kwargs: Any) -> Any:
        if active and engine.is_gradient_accumulation_boundary():
            action()
        return take_step(*args, **kwargs)

    def undo() -> None:
        nonlocal active
        active = False  # the engine goes with its trainer, and this link with it

    engine.step = step
    return undo


class Fragments:
    """The fragments of parameters on this process, as flat tensors that all processes share.

    Args:
        parameters: Parameters by name, in an engine's hands.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        device = next(iter(self._parameters.values())).device.type
        self._mesh: DeviceMesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        #: In the memory that the optimizer steps; without gradients until `take_gradients`.
        self.weights: dict[str, Tensor] = {
            name: self._shared(each, _nothing(each) if (own := _mapping(each)) is None else own.hp_fragment)
            for name, each in self._parameters.items()
        }

    @torch.no_grad()
    def of(self, tensors: Mapping[str, Tensor | float]) -> dict[str, Any]:
        """Cut tensors that are whole on every process as the parameters are.

        Args:
            tensors: Tensors of the parameters' shapes by name, or of shape `()`, or numbers.

        Returns:
            Their fragments; numbers and tensors of shape `()` as they are.
        """
        return {name: self._cut(tensors[name], each) for name, each in self._parameters.items()}

    def take_gradients(self) -> None:
        """Give each fragment of the weights its gradient, which is there between backward pass and step alone.

        An engine that computes in half precision steps float32 weights with gradients that it rounded. What is added
        to these has to be as precise as the weights, so the engine is given float32 ones of the same value.
        """
        for each in self._parameters.values():
            if (own := _mapping(each)) is not None:
                _widen(own.gradient_dict, own.param_group_index, own.hp_fragment.dtype)
        for name, gradient in self.gradients().items():
            self.weights[name].grad = gradient

    def gradients(self) -> dict[str, Tensor]:
        """Give the fragments of the gradients as the engine has them, between backward pass and step alone.

        Returns:
            Flat tensors that all processes share, by name.
        """
        found = {}
        for name, each in self._parameters.items():
            own = _mapping(each)
            found[name] = self._shared(each, _nothing(each) if own is None else _gradient(each, own))
        return found

    def let_go(self) -> None:
        """Forget the gradients: the engine frees them in its step."""
        for each in self.weights.values():
            each.grad = None

    def _cut(self, tensor: Tensor | float, parameter: nn.Parameter) -> Tensor | float:
        if not isinstance(tensor, Tensor) or (tensor.dim() == 0 and parameter.dim() > 0):
            return tensor
        own = _mapping(parameter)
        if own is None:
            return self._shared(parameter, _nothing(tensor))
        address = own.lp_fragment_address
        return self._shared(parameter, tensor.detach().reshape(-1)[address.start : address.start + address.numel])

    def _shared(self, parameter: nn.Parameter, fragment: Tensor) -> Tensor:
        shape = torch.Size([parameter.numel()])
        return DTensor.from_local(fragment.detach(), self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))


@torch.no_grad()
def release(model: nn.Module) -> None:
    """Give a model's parameters memory of their own again, after their engine was destroyed.

    Until then they are views of the row that it made of them.

    Args:
        model: The model; one that was in no engine's hands stays as it is.
    """
    for each in _held(model.parameters()):
        each.data = each.data.clone()
        for name in [name for name in each.__dict__ if name in _LEFT or name.startswith("ds_")]:
            del each.__dict__[name]


def _held(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [each for each in parameters if "_hp_mapping" in each.__dict__]


def _mapping(parameter: Any) -> Any:  # which has attributes of DeepSpeed's
    try:
        return parameter._hp_mapping  # noqa: SLF001 - see above
    except AttributeError:
        raise RuntimeError(
            f"A trained parameter of shape {tuple(parameter.shape)} is not in DeepSpeed's hands, as with no release "
            "that was tested (0.19). Train with DDP or FSDP2, or with that release."
        ) from None


def _gradient(parameter: Any, own: Any) -> Tensor:
    gradient: Tensor = own.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)  # noqa: SLF001 - see above
    address = own.lp_fragment_address
    return gradient if gradient.numel() == address.numel else gradient.narrow(0, address.start, address.numel)


def _widen(gradients: dict[int, Any], group: int, dtype: torch.dtype) -> None:
    if all(each.dtype == dtype for each in gradients[group]):
        return
    widened = [each.to(dtype) for each in gradients[group]]
    for before, each in zip(gradients[group], widened, strict=True):
        each._zero_padding = getattr(before, "_zero_padding", False)  # noqa: SLF001 - of no parameter: not in the norm
    gradients[group] = widened


def _nothing(like: Tensor) -> Tensor:
    return like.detach().new_empty(0)


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's own around another.

    Args:
        optimizer: An optimizer.

    Returns:
        True under ZeRO-1 and -2.
    """
    return hasattr(optimizer, "single_partition_of_fp32_groups")


@torch.no_grad()
def zero_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Put an optimizer's state together: a collective for each tensor.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.

    Returns:
        Entries by parameter name: whole tensors of the parameter's shape, and numbers as they are.
    """
    state = optimizer.optimizer.state
    return {
        name: {key: _whole(value, flat, each) for key, value in state.get(flat, {}).items()}
        for name, each, _, flat in _placed(optimizer, parameters)
    }


@torch.no_grad()
def load_zero_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimizer that has not stepped yet the state of another.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.
        saved: What `zero_state` gave. Parameters not named start fresh, at the step of the others.
    """
    inner = optimizer.optimizer
    pieces: dict[int, dict[str, Any]] = {}  # by the number that torch gives each group's flat tensor
    for name, each, number, flat in _placed(optimizer, parameters):
        own = pieces.setdefault(number, {})
        for key, value in saved.get(name, {}).items():
            if isinstance(value, Tensor) and value.shape == each.shape:
                here, there = _addresses(each)
                own.setdefault(key, torch.zeros_like(flat))[there].copy_(value.reshape(-1)[here])
            else:
                own[key] = value
    inner.load_state_dict(inner.state_dict() | {"state": {number: each for number, each in pieces.items() if each}})


def _placed(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter, int, Tensor]]:
    names = {id(each): name for name, each in parameters.items()}
    flats = enumerate(optimizer.single_partition_of_fp32_groups)
    for (number, flat), group in zip(flats, optimizer.bit16_groups, strict=True):
        for each in group:
            if id(each) in names:
                yield names[id(each)], each, number, flat


def _whole(value: Any, flat: Tensor, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.shape != flat.shape:
        return value
    whole = value.new_zeros(parameter.numel())
    here, there = _addresses(parameter)
    whole[here].copy_(value[there])
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def _addresses(parameter: Any) -> tuple[slice, slice]:
    # Of this process's fragment in the parameter and in the flat tensor; empty where it has none.
    if (mapping := parameter._hp_mapping) is None:  # noqa: SLF001 - DeepSpeed has no public way without moving it all
        return slice(0, 0), slice(0, 0)
    in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return (
        slice(in_parameter.start, in_parameter.start + in_parameter.numel),
        slice(in_flat.start, in_flat.start + in_flat.numel),
    )
