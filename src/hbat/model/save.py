"""A run's model as a folder that any library of the Hugging Face ecosystem loads, and its upload."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hbat.engines.loaded_shards import written_as_whole
from hbat.engines.processes import is_main_process
from hbat.engines.sharded import is_sharded, whole_state
from hbat.model.adapters import ADAPTER
from hbat.state.files import storage_errors

#: What only resuming the run needs, and what shows rows of the user's data or the whole configuration.
_PRIVATE = [
    "state/*", "stage-*", "runs/*", "hbat_state*.json", "trainer_state*.json", "hbat.lock", "*.tmp", "progress.json",
    "completions.jsonl", "report.html", "run.yaml",
]  # fmt: skip


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save model (gathered if it is sharded) or adapter, and tokenizer. Called on every process; the main one writes.

    Raises:
        StorageError: If the disk is full or not writable.
    """
    options: dict[str, Any] = {}
    if is_sharded(model):
        options["state_dict"] = whole_state(model, keep=is_main_process())
    if not is_main_process():
        return
    if hasattr(model, "peft_config"):
        options["selected_adapters"] = [ADAPTER]  # there can be a reference adapter
    with storage_errors(folder), written_as_whole(model), _without_card(model):
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)


@contextmanager
def _without_card(model: Any) -> Iterator[None]:
    """Let PEFT (0.21) write no card of its own, which it also writes into a README.md that is the user's."""
    if not hasattr(model, "create_or_update_model_card"):
        yield
        return
    model.create_or_update_model_card = lambda *_: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


def upload(folder: Path, repo_id: str | None, *, private: bool | None) -> str:
    """Upload a run's model, card and results, by default under the folder's name; returns the commit's URL."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - only needed here

    api = HfApi()
    repository = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=folder,
        ignore_patterns=_PRIVATE,
        commit_message="Hybrid alignment training",
    )
    return str(commit)
