"""What of a model lies on this process under DeepSpeed's ZeRO-3: partitions of weights and gradients.

There no process holds a parameter but for the moment in which it computes with it: `parameter.data` is empty, and
`parameter.ds_tensor` this process's share of its flattened elements. All shares of a parameter are of one length, so
that the last ones end in padding, which is memory as it was found (DeepSpeed 0.19): nothing here ever reads it.
Between stages nothing of this is left: `gather` makes every parameter whole on every process.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hbat.engines.deepspeed.zero12 import Fragments
from hbat.engines.sharded import whole_shape

#: What DeepSpeed leaves on parameters and modules, beside what begins with `ds_`.
_ON_PARAMETERS = {
    "all_gather", "all_gather_coalesced", "partition", "reduce_gradients_at_owner", "partition_gradients",
    "aligned_size", "padding_size", "partition_numel", "item", "convert_to_zero_parameters", "is_external_param",
    "nvme_swapper", "_z3_optimizer",
}  # fmt: skip


_ON_MODULES = {"all_parameters", "_external_params", "_original_parameters", "pre_bwd_fn", "post_bwd_fn"}


def is_partitioned(tensor: object) -> bool:
    """Whether a parameter is in the hands of ZeRO-3.

    Args:
        tensor: A parameter.

    Returns:
        True if this process holds a share of it.
    """
    return isinstance(getattr(tensor, "ds_tensor", None), Tensor)


def shares(parameters: Mapping[str, nn.Parameter]) -> "Fragments | Partitions":
    """Find this process's share of parameters in the hands of DeepSpeed.

    Args:
        parameters: Parameters by name.

    Returns:
        Their partitions under ZeRO-3, their fragments under ZeRO-1 and -2.
    """
    return Partitions(parameters) if any(map(is_partitioned, parameters.values())) else Fragments(parameters)


class Partitions:
    """The partitions of parameters on this process, without padding, as flat tensors that all processes share.

    Args:
        parameters: Parameters by name, in the hands of an engine that trains them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        device = next(iter(self._parameters.values())).device.type
        self._mesh: DeviceMesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        #: In the memory that the optimizer steps; without gradients until `take_gradients`.
        self.weights: dict[str, Tensor] = {
            name: self._shared(each, _optimizer_of(each).get_local_fp32_param(each))
            for name, each in self._parameters.items()
        }

    @torch.no_grad()
    def of(self, tensors: Mapping[str, Tensor | float]) -> dict[str, Any]:
        """Cut tensors as the parameters are.

        Args:
            tensors: Tensors of the parameters' shapes by name, whole on every process or in the hands of ZeRO-3 like
                the parameters, or of shape `()`, or numbers.

        Returns:
            Their partitions; numbers and tensors of shape `()` as they are.
        """
        return {name: self._cut(tensors[name], each) for name, each in self._parameters.items()}

    def take_gradients(self) -> None:
        """Give each partition of the weights its gradient, which is there between backward pass and step alone."""
        for name, each in self.gradients().items():
            self.weights[name].grad = each

    def gradients(self) -> dict[str, Tensor]:
        """Give the partitions of the gradients as the engine has them, between backward pass and step alone.

        Returns:
            Flat tensors that all processes share, by name. In float32, the only precision that is supported, they are
            in DeepSpeed's own memory.
        """
        return {
            name: self._shared(each, _optimizer_of(each).get_local_fp32_grad_for_param(each))
            for name, each in self._parameters.items()
        }

    def let_go(self) -> None:
        """Forget the gradients: the engine uses them up in its step."""
        for each in self.weights.values():
            each.grad = None

    def _cut(self, tensor: Any, parameter: nn.Parameter) -> Any:
        if is_partitioned(tensor):
            return self._shared(parameter, tensor.ds_tensor)
        if not isinstance(tensor, Tensor) or (tensor.dim() == 0 and whole_shape(parameter) != ()):
            return tensor
        return self._shared(parameter, share_of(tensor.detach(), parameter))

    def _shared(self, parameter: Any, share: Tensor) -> Tensor:
        own = share.detach()[: _place(parameter)[1]]  # without padding
        shape = torch.Size([parameter.ds_numel])
        return DTensor.from_local(own, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))


@torch.no_grad()
def gather(model: nn.Module) -> None:
    """Make a model whole on every process, as it was before an engine of ZeRO-3 took it: a collective for each tensor.

    The engine must not compute with it any more.

    Args:
        model: The model; one that was in no such engine's hands stays as it is.
    """
    partitioned: list[Any] = [each for each in model.parameters() if is_partitioned(each)]
    for each in partitioned:
        each.data = whole_of_share(each.ds_tensor, each)
        each.grad = None
        _forget(each, _ON_PARAMETERS)
    for module in model.modules():
        if "_original_parameters" in module.__dict__:
            module._parameters = dict(module._parameters.items())  # noqa: SLF001 - DeepSpeed put its own in its stead
            _forget(module, _ON_MODULES)


def whole_of_share(share: Tensor, parameter: Any) -> Tensor:
    """Put together what processes have of something that has an entry for each element of a parameter.

    Args:
        share: This process's share, with padding.
        parameter: The parameter, in the hands of ZeRO-3.

    Returns:
        The whole tensor on every process, in memory of its own.
    """
    whole = share.new_empty(share.numel() * torch.distributed.get_world_size())
    torch.distributed.all_gather_into_tensor(whole, share.detach().contiguous())
    count = parameter.ds_numel
    return (whole if whole.numel() == count else whole[:count].clone()).view(parameter.ds_shape)


def share_of(whole: Tensor, parameter: Any) -> Tensor:
    """Cut this process's share out of something that has an entry for each element of a parameter.

    Args:
        whole: The tensor, whole on every process.
        parameter: The parameter, in the hands of ZeRO-3.

    Returns:
        The share without padding, in the same memory.
    """
    start, count = _place(parameter)
    return whole.reshape(-1)[start : start + count]


def _place(parameter: Any) -> tuple[int, int]:
    # Where this process's share begins among the parameter's elements, and how many of them it holds.
    length, total = parameter.ds_tensor.numel(), parameter.ds_numel
    start = min(length * torch.distributed.get_rank(), total)
    return start, min(length, total - start)


def _optimizer_of(parameter: Any) -> Any:
    try:
        return parameter._z3_optimizer  # noqa: SLF001 - DeepSpeed's public functions ask the same one, by this name
    except AttributeError:
        raise RuntimeError(
            f"A trained parameter of shape {tuple(getattr(parameter, 'ds_shape', parameter.shape))} is not in the "
            "hands of a DeepSpeed that trains it, as with no release that was tested (0.19). Train with DDP or FSDP2, "
            "or with that release."
        ) from None


def _forget(owner: Any, names: Iterable[str]) -> None:
    for name in [each for each in owner.__dict__ if each in names or each.startswith("ds_")]:
        del owner.__dict__[name]


def is_zero3(optimizer: Any) -> bool:
    """Whether an optimizer is ZeRO-3's own around another.

    Args:
        optimizer: An optimizer.

    Returns:
        True under ZeRO-3 alone.
    """
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


@torch.no_grad()
def zero3_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Put an optimizer's state together: a collective for each tensor.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.

    Returns:
        Entries by parameter name: whole tensors of the parameter's shape, and numbers as they are.
    """
    state = optimizer.optimizer.state
    return {
        name: {
            key: whole_of_share(value[place], each) if _is_like(value, flat) else value
            for key, value in state.get(flat, {}).items()
        }
        for name, each, flat, place in _placed(optimizer, parameters)
    }


@torch.no_grad()
def load_zero3_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimizer that has not stepped yet the state of another.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.
        saved: What `zero3_state` gave. Parameters not named start fresh, at the step of the others.
    """
    pieces: dict[Tensor, dict[str, Any]] = {}
    for name, each, flat, place in _placed(optimizer, parameters):
        own = pieces.setdefault(flat, {})
        for key, value in saved.get(name, {}).items():
            if isinstance(value, Tensor) and value.shape == each.ds_shape:
                share = share_of(value, each)
                own.setdefault(key, torch.zeros_like(flat))[place][: share.numel()].copy_(share)
            else:
                own[key] = value
    inner = optimizer.optimizer
    optimizer._set_fp32_optimizer_param_groups()  # noqa: SLF001 - as it does to load a state of its own
    try:
        numbers = {id(each): number for number, each in enumerate(_flats(inner))}
        state = {numbers[id(flat)]: own for flat, own in pieces.items() if own}
        inner.load_state_dict(inner.state_dict() | {"state": state})
    finally:
        optimizer._clear_fp32_optimizer_param_groups()  # noqa: SLF001 - as above


def _flats(inner: Any) -> Iterator[Tensor]:
    for group in inner.param_groups:
        yield from group["params"]


def _placed(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Any, Tensor, slice]]:
    for name, each in parameters.items():
        group, start, count = optimizer.grad_position[optimizer.get_param_id(each)]
        yield name, each, optimizer.fp32_partitioned_groups_flat[group], slice(start, start + count)


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
