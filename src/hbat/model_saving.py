"""A run's model as a folder that any library of the host reads."""

from pathlib import Path
from typing import Any

from hbat.ewc.shards import is_sharded, whole_state
from hbat.loaded_shards import written_as_whole
from hbat.processes import is_main_process
from hbat.reference_adapter import ADAPTER
from hbat.storage import written_by_the_host


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save model or adapter, and tokenizer.

    All processes call it, the main one writes: the parts of a sharded model are put together first.

    Args:
        folder: The folder.
        model: The model.
        tokenizer: The tokenizer.

    Raises:
        StorageError: If the disk is full or may not be written to.
    """
    options: dict[str, Any] = {}
    if is_sharded(model):
        options["state_dict"] = whole_state(model, keep=is_main_process())
    if not is_main_process():
        return
    if hasattr(model, "peft_config"):
        options["selected_adapters"] = [ADAPTER]  # under FSDP the reference adapter lies beside it
    with written_by_the_host(folder), written_as_whole(model):
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
