"""PPO: hbat's trainer and that of TRL 1.12, the last with a PPOTrainer, on the same work; in turn, one thread each.

Each run is a process (`ppo_worker.py`) that trains a Llama of 20M parameters, 30 % of them embeddings, on rollouts of
16 prompts of 16 to 48 tokens with completions of 48: 4 epochs in mini-batches of 4. TRL's runs in an environment of
its own. Time is that of the rollouts after the first: wall and CPU (which other load disturbs less). Peak memory is
the highest resident size during training less that before any model exists: policy, reference, critic, reward model,
gradients, moments and activations.

    python benchmarks/ppo.py --trl-python .venv-trl112/bin/python [--lengths uneven] [--reward model]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from workload import save

#: hbat's critic is a head on the policy, or like TRL's a second model of the same size.
VARIANTS = {"TRL 1.12": "trl", "hbat, critic shared": "shared", "hbat, critic separate": "separate"}
WORKER = Path(__file__).parent / "ppo_worker.py"


def run(python: str, work: dict[str, Any]) -> dict[str, Any]:
    """Run one worker and return its measurements."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    command = [python, str(WORKER), json.dumps(work)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def paired(runs: dict[str, list[dict[str, Any]]], name: str, clock: str) -> list[float]:
    """Time of TRL over that of a variant, by repeat."""
    return [base[clock] / own[clock] for base, own in zip(runs["TRL 1.12"], runs[name], strict=True)]


def report(runs: dict[str, list[dict[str, Any]]], prompts: int) -> dict[str, Any]:
    """Print the table and return it as a mapping."""
    result = {}
    base = statistics.median(run["peak"] for run in runs["TRL 1.12"])
    print(f"{'':24}{'samples/s':>10}{'over TRL: wall':>19}{'cpu':>19}{'peak MiB':>10}{'weights':>9}{'TRL/it':>8}")
    for name, repeats in runs.items():
        speed = statistics.median(run["rollouts"] * prompts / run["wall"] for run in repeats)
        ratios = {clock: paired(runs, name, clock) for clock in ("wall", "cpu")}
        shown = [f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})" for found in ratios.values()]
        peak = statistics.median(run["peak"] for run in repeats)
        copies = peak / repeats[0]["weights"]
        print(f"{name:24}{speed:10.3f}{shown[0]:>19}{shown[1]:>19}{peak / 2**20:10.0f}{copies:9.1f}{base / peak:8.2f}")
        result[name] = {
            "samples_per_second": speed,
            "over_trl": ratios,
            "peak": peak,
            "copies": copies,
            "runs": repeats,
        }
    for name, repeats in runs.items():
        if not repeats[0]["phases"]:
            continue
        whole = statistics.median(run["wall"] for run in repeats)
        phases = {key: statistics.median(run["phases"][key] for run in repeats) for key in repeats[0]["phases"]}
        shares = ", ".join(f"{key} {value / whole:.0%}" for key, value in phases.items())
        print(f"{name}: {shares}, the rest {1 - sum(phases.values()) / whole:.0%}")
    return result


def same_work(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Describe the work of each variant, which must be the same."""
    counted = ("updates", "scored", "words")
    return "; ".join(
        f"{name}: " + ", ".join(f"{statistics.mean(run[key] for run in repeats):.0f} {key}" for key in counted)
        for name, repeats in runs.items()
    )


def main() -> None:
    """Time the variants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with trl 1.12")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--lengths", choices=("even", "uneven"), default="even")
    parser.add_argument("--reward", choices=("rule", "model"), default="rule")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=16)
    given = parser.parse_args()
    fields = ("rollouts", "lengths", "reward", "hidden", "layers", "prompts")
    work = {key: value for key, value in vars(given).items() if key in fields}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(given.repeats):
        for name, variant in VARIANTS.items():
            python = given.trl_python if variant == "trl" else sys.executable
            runs[name].append(run(python, work | {"variant": variant}))
    weights = next(iter(runs.values()))[0]["weights"]
    print(
        f"{given.lengths} lengths, reward by {given.reward}, {weights / 4e6:.1f}M parameters, {given.repeats} repeats"
    )
    result = report(runs, given.prompts)
    print(same_work(runs))
    save(f"ppo-{given.lengths}-{given.reward}", {"work": work, "variants": result})


if __name__ == "__main__":
    main()
