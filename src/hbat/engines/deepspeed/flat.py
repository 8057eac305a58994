"""What ZeRO-1, -2 and -3 have in common: each rank holds a slice of every parameter's flattened elements."""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hbat.engines.engine import Local
from hbat.engines.sharded import part_of, whole_shape


class FlatLocal(Local):
    """This rank's slices of parameters that a DeepSpeed engine trains, as flat DTensors over all ranks.

    `weights` are the float32 weights that the optimizer steps.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        device = next(iter(parameters.values())).device.type
        self._mesh: DeviceMesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        super().__init__({})
        self.weights = self._slices(self._weight)

    @torch.no_grad()
    def of(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Cut and place tensors that are whole on every rank, or partitioned by ZeRO-3, as the weights are."""
        return {name: self._of(tensors[name], name, parameter) for name, parameter in self._parameters.items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather what `of` has cut, on every rank."""
        return {name: self._whole(tensors[name], parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _whole(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        # Slices are not the even ones that `DTensor.full_tensor` puts together.
        share = part_of(tensor).to(self._mesh.device_type)
        whole = share.new_zeros(whole_shape(parameter))
        self._cut(whole, parameter).copy_(share)
        torch.distributed.all_reduce(whole)
        return whole

    def _of(self, tensor: Any, name: str, parameter: nn.Parameter) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        device = self.weights[name].device
        if whole_shape(tensor) == () and whole_shape(parameter) != ():
            return tensor.to(device)
        return self._shared(parameter, self._cut(tensor, parameter).to(device))

    def gradients(self) -> dict[str, Tensor]:
        """Slices of the gradients as the engine has them, between backward pass and step."""
        return self._slices(self._gradient)

    def take_gradients(self) -> None:
        """Put them into `weights[...].grad`."""
        for name, gradient in self.gradients().items():
            self.weights[name].grad = gradient

    def release_gradients(self) -> None:
        """Forget them: the engine uses them up in its step."""
        for weight in self.weights.values():
            weight.grad = None

    def _slices(self, slice_of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return {name: self._shared(parameter, slice_of(parameter)) for name, parameter in self._parameters.items()}

    def _shared(self, parameter: nn.Parameter, own: Tensor) -> Tensor:
        shape = torch.Size([math.prod(whole_shape(parameter))])
        return DTensor.from_local(own.detach(), self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))

    @abstractmethod
    def _weight(self, parameter: Any) -> Any: ...

    @abstractmethod
    def _gradient(self, parameter: Any) -> Tensor: ...

    @abstractmethod
    def _cut(self, tensor: Any, parameter: Any) -> Any: ...


class Slot(NamedTuple):
    """Where this rank's elements of a parameter lie in one of the optimizer's flat tensors."""

    name: str
    shape: tuple[int, ...]
    here: slice  # of the flattened parameter
    flat: Tensor
    there: slice  # of the flat tensor


@torch.no_grad()
def state_of(inner: torch.optim.Optimizer, slots: Iterable[Slot]) -> dict[str, dict[str, Any]]:
    """Gather the state of the torch optimizer inside DeepSpeed's, by parameter name: a collective for each tensor."""
    return {
        slot.name: {key: _whole(value, slot) for key, value in inner.state.get(slot.flat, {}).items()}
        for slot in slots
    }


def _whole(value: Any, slot: Slot) -> Any:
    if not isinstance(value, Tensor) or value.shape != slot.flat.shape:
        return value
    whole = value.new_zeros(math.prod(slot.shape))
    whole[slot.here].copy_(value[slot.there])
    torch.distributed.all_reduce(whole)
    return whole.view(slot.shape)


@torch.no_grad()
def load_state(inner: torch.optim.Optimizer, slots: Iterable[Slot], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Load what `state_of` gave. Parameters without state start fresh, at the step of the others."""
    state: dict[Tensor, dict[str, Any]] = {}
    for slot in slots:
        own = state.setdefault(slot.flat, {})
        for key, value in saved.get(slot.name, {}).items():
            if isinstance(value, Tensor) and value.shape == slot.shape:
                own.setdefault(key, torch.zeros_like(slot.flat))[slot.there].copy_(value.reshape(-1)[slot.here])
            else:
                own[key] = value
    flats = [flat for group in inner.param_groups for flat in group["params"]]
    numbers = {id(flat): number for number, flat in enumerate(flats)}
    by_number = {numbers[id(flat)]: own for flat, own in state.items() if own}
    inner.load_state_dict(inner.state_dict() | {"state": by_number})


def forget(owner: Any, names: Collection[str]) -> None:
    """Remove what DeepSpeed left on a parameter or module: these attributes, and all that begin with `ds_`."""
    for name in [name for name in owner.__dict__ if name in names or name.startswith("ds_")]:
        del owner.__dict__[name]


def untested_release(shape: Any) -> RuntimeError:
    """Make the error about a trained parameter that DeepSpeed does not know by the names of release 0.19."""
    return RuntimeError(
        f"DeepSpeed does not hold the trained parameter of shape {tuple(shape)} as release 0.19 does, the only one "
        "that was tested. Install that release, or train with DDP or FSDP2."
    )
