"""Uploads what a run leaves for others."""

from pathlib import Path

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
