"""What PPO remembers between steps beside the weights, and its place in a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hbat.ppo.rollouts.rollout import Rollout
from hbat.state.files import write_json

_FILE = "ppo_state.json"


@dataclass
class Progress:
    """Where PPO stands within a rollout.

    Attributes:
        kl_coef: Weight of the KL penalty.
        skips: Whether the rollout's remaining updates are skipped.
        entries: Values to log at the next opportunity, by name.
        rollout: The rollout that is trained on; None before the first.
    """

    kl_coef: float
    skips: bool = False
    entries: dict[str, list[float]] = field(default_factory=dict)
    rollout: Rollout | None = None

    def note(self, values: Mapping[str, float]) -> None:
        """Remember values for the log.

        Args:
            values: Numbers by name.
        """
        for name, value in values.items():
            self.entries.setdefault(name, []).append(value)

    def taken(self) -> dict[str, float]:
        """Take out what is to be logged.

        Returns:
            Means by name; times are summed.
        """
        entries, self.entries = self.entries, {}
        return {
            name: sum(values) if name.startswith("seconds/") else sum(values) / len(values)
            for name, values in entries.items()
        }

    def save(self, folder: Path, process: int, *, mid_rollout: bool) -> None:
        """Write to a checkpoint.

        Args:
            folder: The checkpoint's folder.
            process: Number of this process; each has a rollout of its own.
            mid_rollout: Whether the rollout is needed to go on.
        """
        if mid_rollout and self.rollout is not None:
            self.rollout.save(folder / f"rollout_{process}.safetensors")
        if process == 0:
            values = asdict(self) if self.rollout is None else asdict(Progress(self.kl_coef, self.skips, self.entries))
            write_json(folder / _FILE, {key: value for key, value in values.items() if key != "rollout"})

    def load(self, folder: Path, process: int, device: Any) -> None:
        """Read from a checkpoint.

        Args:
            folder: The checkpoint's folder.
            process: Number of this process.
            device: Where the rollout's tensors shall lie.
        """
        values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        self.kl_coef, self.skips, self.entries = values["kl_coef"], values["skips"], values["entries"]
        file = folder / f"rollout_{process}.safetensors"
        self.rollout = Rollout.load(file, device) if file.exists() else None
