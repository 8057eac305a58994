"""The log file of a run, a `trainer_state.json` of transformers. Read back only as far as a state vouches for it."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState

from hbat.engines.processes import is_main_process
from hbat.reports.files import LOG_FILE
from hbat.state.files import digest, write_json

logger = logging.getLogger(__name__)


def save_log(folder: Path, state: TrainerState) -> dict[str, Any]:
    """Write the log, on the main process.

    Returns:
        What the run's state records of it: the number of entries, to which more may come, and their checksum.
    """
    if state.is_world_process_zero:
        write_json(folder / LOG_FILE, asdict(state))  # `TrainerState.save_to_json` is not atomic
    return {"entries": len(state.log_history), "checksum": digest(state.log_history)}


def load_log(folder: Path, step: int, expected: Mapping[str, Any]) -> TrainerState:
    """Read the log of a run that is resumed. A damaged one is moved aside, for training does not need it.

    Args:
        folder: The run's folder.
        step: Step from which the run is resumed.
        expected: What `save_log` returned at the last commit; later entries belong to work that is done again.

    Returns:
        The log, with nothing in it but its entries and the step.
    """
    file, count = folder / LOG_FILE, expected.get("entries", 0)
    entries, wrong = [], None
    try:
        if count:
            entries = list(json.loads(file.read_text(encoding="utf-8"))["log_history"])[:count]
            wrong = None if digest(entries) == expected.get("checksum") else "its entries are not what was logged"
    except FileNotFoundError:
        wrong = "it is missing"
    except (KeyError, OSError, TypeError, ValueError) as error:
        wrong = f"it cannot be read: {error!r}"
    if wrong is not None:
        entries = []
        aside = _move_aside(file)
        logger.warning("The log %s is damaged (%s). The run is resumed with an empty log%s.", file, wrong, aside)
    return TrainerState(log_history=entries, global_step=step)


def _move_aside(file: Path) -> str:
    damaged = file.with_name("trainer_state.damaged.json")
    if not file.is_file() or not is_main_process():
        return ""
    file.replace(damaged)
    return f"; what is left of it is in {damaged}"
