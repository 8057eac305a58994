"""The host's own checkpoints inside a stage: from which one a stage that was cut off goes on."""

from collections.abc import Callable
from pathlib import Path


def last_checkpoint(folder: Path, max_steps: int, resumes_at: Callable[[int], bool] | None = None) -> str | None:
    """Find the checkpoint from which a stage that was cut off goes on.

    Args:
        folder: The stage's folder.
        max_steps: The stage's `max_steps`; 0 or less where epochs bound it.
        resumes_at: Whether the stage can go on from a checkpoint at a step; from any where left out.

    Returns:
        The newest such checkpoint that is whole, or None to start the stage anew.
    """
    found = []
    for each in folder.glob("checkpoint-*"):
        number = each.name.removeprefix("checkpoint-")
        # The host writes the optimizer before the state; `save_only_model` leaves nothing to go on from exactly.
        if number.isdigit() and all((each / name).exists() for name in ("optimizer.pt", "trainer_state.json")):
            found.append((int(number), each))
    # The host trains one step too many from a checkpoint that is at `max_steps` in the middle of an epoch (seen in
    # transformers 4.57-5.23), so a stage killed between its last step and its commit starts anew.
    if not found or 0 < max_steps <= max(found)[0]:
        return None
    good = [each for each in found if resumes_at is None or resumes_at(each[0])]
    return str(max(good)[1]) if good else None
