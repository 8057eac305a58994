"""The penalty's gradient on a GPU: bytes that it must move over the time it takes, against the bandwidth of a copy.

Two sets of trained weights in the shape of a model of 7B parameters: all weights of some of its blocks in float32, and
a LoRA adapter of all its blocks in float32 and in bfloat16 (what QLoRA trains). With importance by tensor, parameter,
anchor and gradient are read and the gradient is written; by element, importance is read as well. An adapter is small:
there the launches of kernels count, and milliseconds say more than bandwidth. Without a GPU: toy size on the CPU.

    python benchmarks/gpu/penalty.py [--toy] [--repeats 20]
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scale import SCALES, Scale, device, fastest, hardware, parser_of, random_llama, release, scale_name
from workload import save

from hbat.ewc import add_penalty_gradient_, snapshot, trainable_parameters
from hbat.ewc.parameters import on_device

STRENGTH = 10.0
#: Name of a set of weights: whether it is an adapter, and the type of its weights.
SETS = {
    "all weights, float32": (False, torch.float32),
    "LoRA, float32": (True, torch.float32),
    "LoRA, bfloat16": (True, torch.bfloat16),
}


def trained(scale: Scale, *, lora: bool, dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """Make trained weights with gradients.

    Args:
        scale: Sizes.
        lora: Whether those of an adapter.
        dtype: Their type.

    Returns:
        The parameters by name.
    """
    model = random_llama(scale, scale.layers if lora else scale.full_layers, torch.bfloat16 if lora else dtype)
    if lora:
        adapter = LoraConfig(r=scale.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    parameters = trainable_parameters(model)
    for each in parameters.values():
        each.data = each.data.to(dtype)
        each.grad = torch.zeros_like(each)
    return parameters


def copy_bandwidth(size: int, repeats: int) -> float:
    """Measure a copy on the device.

    Args:
        size: Bytes of the source.
        repeats: How often.

    Returns:
        Bytes a second, read and written together.
    """
    source = torch.ones(size // 4, device=device())
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / fastest(lambda: target.copy_(source), repeats)


def measure(parameters: dict[str, torch.nn.Parameter], *, element: bool, repeats: int) -> dict[str, Any]:
    """Time the penalty's gradient.

    Args:
        parameters: Parameters with gradients.
        element: Whether importance is given by element.
        repeats: How often.

    Returns:
        Least seconds, and the bytes that any implementation moves.
    """
    anchor = snapshot(parameters)
    importance = on_device(
        {name: torch.rand(each.shape if element else ()) for name, each in parameters.items()}, parameters
    )
    seconds = fastest(
        lambda: add_penalty_gradient_(parameters, anchor, importance, strength=STRENGTH), repeats
    )  # fmt: skip
    moved = sum(each.numel() * (4 * each.element_size() + 4 * element) for each in parameters.values())
    return {"seconds": seconds, "bytes": moved}


def main() -> None:
    """Measure both granularities on each set of weights and print the table."""
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=20)
    given = parser.parse_args()
    name = scale_name(toy=given.toy)
    bandwidth = copy_bandwidth(2**31 if name == "7b" else 2**20, given.repeats)
    print(f"{hardware()['device']}: a copy moves {bandwidth / 1e9:.1f} GB/s (read and written)")
    print(f"{'':48}{'tensors':>9}{'elements':>12}{'ms':>9}{'GB/s':>9}{'of a copy':>11}")
    result = {}
    for label, (lora, dtype) in SETS.items():
        release()
        parameters = trained(SCALES[name], lora=lora, dtype=dtype)
        count = sum(each.numel() for each in parameters.values())
        for element in (False, True):
            each = measure(parameters, element=element, repeats=given.repeats)
            speed = each["bytes"] / each["seconds"]
            key = f"{label}, by {'element' if element else 'tensor'}"
            result[key] = each | {"elements": count, "tensors": len(parameters), "of_a_copy": speed / bandwidth}
            print(
                f"{key:48}{len(parameters):9}{count:12}{1e3 * each['seconds']:9.3f}{speed / 1e9:9.1f}"
                f"{speed / bandwidth:11.2f}"
            )
        del parameters
    save(
        "gpu-penalty",
        {"scale": name, "hardware": hardware(), "copy_bandwidth": bandwidth, "sets": result},
        given.results,
    )


if __name__ == "__main__":
    main()
