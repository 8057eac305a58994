"""The upload of a run to the Hub: what it needs, before the run, and the upload itself, after it."""

from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.utils import validate_repo_id

from hbat.cli.run_file import RunFile
from hbat.engines.processes import is_main_process
from hbat.model.save import upload


def check_upload(run: RunFile) -> None:
    """Raise ValueError if a run could not be uploaded as its file says. Asks the network for nothing."""
    if not run.push_to_hub:
        for key in ("hub_model_id", "hub_private_repo"):
            if (value := getattr(run, key)) is not None:
                raise ValueError(f"`{key}` is {value!r}, but nothing is uploaded. Set `push_to_hub: true`.")
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "`push_to_hub` is true, but HF_HUB_OFFLINE=1 keeps huggingface_hub off the network. Unset one of the two."
        )
    if get_token() is None:
        raise ValueError(
            "`push_to_hub` is true, but there is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN."
        )
    try:
        validate_repo_id(run.hub_model_id or Path(run.config.output_dir).resolve().name)
    except ValueError as error:
        raise ValueError(f"`hub_model_id` (default: the name of `output_dir`): {error}") from error


def upload_run(run: RunFile) -> str:
    """Upload a finished run if its file says so; returns the address, or an empty string. Its model is on disk."""
    if not run.push_to_hub or not is_main_process():
        return ""
    folder = Path(run.config.output_dir).absolute()
    try:
        return upload(folder, run.hub_model_id, private=run.hub_private_repo)
    except Exception as error:
        raise RuntimeError(
            f"The run is finished and its model is in {folder}, but the upload failed: {error}. Run `hbat train "
            "--resume` to upload it; nothing is trained again."
        ) from error
