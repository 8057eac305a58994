"""Cost of penalty and path integral on a model of 100M parameters, beside autograd and the limit of memory bandwidth.

`authors` is the loop of the authors' code: a sum of weighted squared distances with its own backward pass. The floor
is what any implementation must move at the best bandwidth of torch's simplest kernels on the same tensors: read
parameter, anchor and gradient and write the gradient, 16 bytes per element, 20 with an importance per element. The
path integral reads these and itself, writes itself and a copy of the gradient before the step, and all but that copy
again after it: 44. Each peak is measured in its own process.

    python benchmarks/penalty.py [--repeats 7]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from workload import llama, save, status

from hbat.ewc import add_path_, add_penalty_gradient_, snapshot, trainable_parameters

STRENGTH = 10.0
VARIANTS = ("closed form, per tensor", "closed form, per element", "path, per element", "authors, per tensor")
BYTES = dict(zip(VARIANTS, (16, 20, 44, 16), strict=True))


def prepare(variant: str) -> tuple[dict, dict, dict, dict]:
    """Parameters with gradients, their anchor, their importance and room for copies of the gradients, by name."""
    parameters = trainable_parameters(llama(640, 12, vocabulary=32000))
    anchor = snapshot(parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1e-3)
            parameter.grad = torch.zeros_like(parameter)
    per_element = variant.endswith("element")
    importance = {name: torch.rand(value.shape if per_element else ()) for name, value in parameters.items()}
    return parameters, anchor, importance, {}


def step(variant: str, parameters: dict, anchor: dict, importance: dict, copies: dict) -> None:
    """Add the penalty's gradient once."""
    if variant.startswith("closed"):
        add_penalty_gradient_(parameters, anchor, importance, strength=STRENGTH)
    elif variant.startswith("path"):
        for name, parameter in parameters.items():
            copies.setdefault(name, torch.empty_like(parameter)).copy_(parameter.grad)
        for after_step in (False, True):
            add_path_(importance, parameters, anchor, copies, after_step=after_step)
    else:
        loss = 0
        for name, parameter in parameters.items():
            loss += (importance[name] * (parameter - anchor[name]) ** 2).sum()
        (STRENGTH * loss).backward()


def bandwidth(parameters: dict, anchor: dict) -> float:
    """Best bandwidth, in bytes per second, of a copy, an in-place sum, a scaling and a read of these tensors."""
    gradients = [(parameter.grad, anchor[name]) for name, parameter in parameters.items()]
    count = sum(gradient.numel() for gradient, _ in gradients)
    best = 0.0
    for moved, action in (
        (2, lambda gradient, other: gradient.copy_(other)),
        (3, lambda gradient, other: gradient.add_(other)),
        (2, lambda gradient, _: gradient.mul_(0.0)),
        (1, lambda _, other: other.sum()),
    ):
        for _ in range(3):
            start = time.perf_counter()
            for gradient, other in gradients:
                action(gradient, other)
            best = max(best, moved * count * 4 / (time.perf_counter() - start))
    return best


def peak(variant: str) -> None:
    """Print by how many bytes one step raises the peak memory of this process."""
    state = prepare(variant)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = status("VmHWM")
    step(variant, *state)
    print(json.dumps(status("VmHWM") - before))


def main() -> None:
    """Time the variants in turn, measure their peaks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", choices=VARIANTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        peak(given.peak)
        return
    states = {variant: prepare(variant) for variant in VARIANTS}
    count = sum(parameter.numel() for parameter in states[VARIANTS[0]][0].values())
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    speed = 0.0
    for _ in range(given.repeats):
        speed = max(speed, bandwidth(*states[VARIANTS[0]][:2]))
        for variant, state in states.items():
            start = time.perf_counter()
            step(variant, *state)
            times[variant].append(time.perf_counter() - start)
    print(
        f"{count / 1e6:.0f}M parameters, one thread, best bandwidth {speed / 1e9:.1f} GB/s, minima of {given.repeats}"
    )
    print(f"{'':28}{'ms':>8}{'over floor':>12}{'authors over it':>17}{'extra peak MiB':>16}")
    result = {}
    slowest = min(times["authors, per tensor"])
    for variant, seconds in times.items():
        floor = count * BYTES[variant] / speed
        command = [sys.executable, __file__, "--peak", variant]
        extra = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        best = min(seconds)
        result[variant] = {
            "seconds": seconds,
            "over_floor": best / floor,
            "authors_over": slowest / best,
            "peak": extra,
        }
        print(f"{variant:28}{best * 1e3:8.1f}{best / floor:12.2f}{slowest / best:17.1f}{extra / 2**20:16.0f}")
    save("penalty", {"parameters": count, "bandwidth": speed, "variants": result})


if __name__ == "__main__":
    main()
