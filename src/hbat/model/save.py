"""A run's model as a folder that any library of the host reads."""

from pathlib import Path
from typing import Any

from hbat.engines.loaded_shards import written_as_whole
from hbat.engines.processes import is_main_process
from hbat.engines.sharded import is_sharded, whole_state
from hbat.model.adapters import ADAPTER
from hbat.state.files import storage_errors


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
    with storage_errors(folder), written_as_whole(model):
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)


#: What only the run itself needs to go on.
_PRIVATE = ["state/*", "stage-*", "runs/*", "hbat_state*.json", "trainer_state*.json", "hbat.lock", "*.tmp"]


def upload(folder: Path, repo_id: str | None, *, private: bool | None) -> str:
    """Upload a run's model, card and results.

    Args:
        folder: The run's folder.
        repo_id: Repository; the name of the folder where left out.
        private: Whether a new repository is private.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415 - only needed here

    api = HfApi()
    repository = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True)
    return str(
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            ignore_patterns=_PRIVATE,
            commit_message="Hybrid alignment training",
        )
    )
