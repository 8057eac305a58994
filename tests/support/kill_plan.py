"""What a campaign of kills does and counts: configurations, moments, and how ends are compared. Trains nothing."""

import random
from collections import Counter
from dataclasses import asdict, dataclass

# --- configurations --------------------------------------------------------------------------------------------------

#: Levels by factor. Drawn so that each occurs about equally often.
FACTORS = {
    "objectives": ("sft+dpo", "sft+ppo", "sft+dpo", "sft+ppo", "sft+grpo"),
    "model": ("full", "lora"),
    "optimizer_state": ("reset", "carry"),
    "method": ("gradient", "proximal"),
    "granularity": ("element", "tensor"),
    "source": ("displacement", "fisher"),
    "checkpoints": ("none", "in stages"),
}


@dataclass(frozen=True)
class Case:
    """Configuration of a run."""

    objectives: str
    model: str = "full"
    optimizer_state: str = "carry"
    method: str = "gradient"
    granularity: str = "element"
    source: str = "displacement"
    checkpoints: str = "none"
    evaluates_all: bool = True

    def __str__(self):
        return " ".join(str(each) for name, each in asdict(self).items() if name in FACTORS)


def draw_cases(count, seed):
    """Configurations with every level of every factor about equally often, in random combinations."""
    chance = random.Random(seed)

    def shuffled(levels, number):
        drawn = [levels[index % len(levels)] for index in range(number)]
        chance.shuffle(drawn)
        return drawn

    columns = {name: shuffled(levels, count) for name, levels in FACTORS.items()}
    # Only SFT and DPO have sequences of which there is a Fisher.
    with_fisher = [index for index, each in enumerate(columns["objectives"]) if each == "sft+dpo"]
    columns["source"] = ["displacement"] * count
    for index, source in zip(with_fisher, shuffled(FACTORS["source"], len(with_fisher)), strict=True):
        columns["source"][index] = source
    return [Case(**{name: values[index] for name, values in columns.items()}) for index in range(count)]


# --- moments ---------------------------------------------------------------------------------------------------------

#: What a run can be doing.
PHASES = ("building", "rollout", "update", "checkpoint", "commit", "evaluation", "reports")
#: Operations on files, by what they belong to: the run's own state, and all others.
GROUPS = ("state", "other")


@dataclass(frozen=True)
class Kill:
    """When a run is killed.

    `kind` is `time` (SIGKILL from outside after `seconds`), `operation` (SIGKILL right before operation `number` of a
    group), `empty` (the same, right after the operation has opened its file for writing) or `torn` (from operation
    `number` on no file may grow beyond `size` bytes: the kernel ends the process within the write). `step` is SIGKILL
    at the beginning of optimizer step `number`, `term` SIGTERM from outside `seconds` after the first stage has begun.
    """

    kind: str
    seconds: float = 0.0
    group: str = "state"
    number: int = 0
    size: int = 0


def draw_kill(chance, whole, left=1.0, *, first=False):
    """A moment of what is left of a run, half of them at its operations on files; `whole` is the uninterrupted one.

    The first kill of a run is SIGKILL; later ones may be the kernel's in the middle of a write.
    """
    kind = chance.choices(["time", "operation", "empty", "torn"], [5, 3, 1, 0 if first else 2])[0]
    share = left * chance.random()
    if kind == "time":
        return Kill(kind, seconds=share * whole.seconds)
    group = chance.choices(GROUPS, [2, 1])[0]
    number = 1 + int(share * whole.operations[group])
    return Kill(kind, group=group, number=number, size=chance.choice([0, 1, 100, 1000, 5000]))


# --- results ---------------------------------------------------------------------------------------------------------


def differences(found, expected):
    """What differs between two ends, in words."""
    return [
        f"{key}: {expected.get(key)!r} -> {found.get(key)!r}"[:300]
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]


def tally(reports):
    """Runs, kills, resumes and bit-identical ends by level of each factor; of reports as plain values."""
    table = {}
    for each in reports:
        for name in FACTORS:
            row = table.setdefault((name, each["case"][name]), Counter())
            row.update(runs=1, kills=len(each["kills"]), resumes=each["resumes"], identical=int(each["identical"]))
    order = list(FACTORS)
    return dict(sorted(table.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))
