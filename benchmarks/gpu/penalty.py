"""The penalty's gradient on a GPU: the bandwidth it reaches compared with that of a copy.

On trained weights in the shape of a model of 7B parameters: all weights of some of its layers in float32, and a LoRA
adapter of all its layers in float32 and bfloat16 (as in QLoRA). With importance per tensor, parameter, anchor and
gradient are read and the gradient is written; per element, importance is read as well. An adapter is small: there
kernel launches dominate, and milliseconds say more than bandwidth. Without a GPU: toy size on the CPU.

    python benchmarks/gpu/penalty.py [--toy] [--repeats 20]
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scale import SCALES, Scale, device, fastest, hardware, parser_of, random_llama, release, scale_name
from workload import save

from hbat.ewc import add_penalty_gradient_, snapshot, trainable_parameters

STRENGTH = 10.0
#: Sets of weights: whether each is an adapter, and its dtype.
SETS = {
    "all weights, float32": (False, torch.float32),
    "LoRA, float32": (True, torch.float32),
    "LoRA, bfloat16": (True, torch.bfloat16),
}


def trained(scale: Scale, *, lora: bool, dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters with gradients, by name."""
    model = random_llama(scale, scale.layers if lora else scale.full_layers, torch.bfloat16 if lora else dtype)
    if lora:
        adapter = LoraConfig(r=scale.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype)
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def copy_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.ones(size // 4, device=device())
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / fastest(lambda: target.copy_(source), repeats)


def measure(parameters: dict[str, torch.nn.Parameter], *, per_element: bool, repeats: int) -> dict[str, Any]:
    """Least seconds of the penalty's gradient, and the bytes that any implementation moves."""
    anchor = snapshot(parameters)
    importance = {
        name: torch.rand(parameter.shape if per_element else (), device=parameter.device)
        for name, parameter in parameters.items()
    }
    seconds = fastest(lambda: add_penalty_gradient_(parameters, anchor, importance, strength=STRENGTH), repeats)
    moved = sum(value.numel() * (4 * value.element_size() + 4 * per_element) for value in parameters.values())
    return {"seconds": seconds, "bytes": moved}


def main() -> None:
    """Measure both granularities on each set of weights and print the table."""
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=20)
    given = parser.parse_args()
    name = scale_name(toy=given.toy)
    bandwidth = copy_bandwidth(2**31 if name == "7b" else 2**20, given.repeats)
    print(f"{hardware()['device']}: a copy moves {bandwidth / 1e9:.1f} GB/s (read and written)")
    print(f"{'':36}{'tensors':>9}{'elements':>12}{'ms':>9}{'GB/s':>9}{'of a copy':>11}")
    result = {}
    for label, (lora, dtype) in SETS.items():
        release()
        parameters = trained(SCALES[name], lora=lora, dtype=dtype)
        count = sum(parameter.numel() for parameter in parameters.values())
        for per_element in (False, True):
            measured = measure(parameters, per_element=per_element, repeats=given.repeats)
            speed = measured["bytes"] / measured["seconds"]
            key = f"{label}, per {'element' if per_element else 'tensor'}"
            result[key] = measured | {"elements": count, "tensors": len(parameters), "of_a_copy": speed / bandwidth}
            print(
                f"{key:36}{len(parameters):9}{count:12}{1e3 * measured['seconds']:9.3f}{speed / 1e9:9.1f}"
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
