"""The upload of a run to the Hub: what it needs, before the run, and the upload itself, after it."""

from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.utils import validate_repo_id

from hbat.cli.run_file import RunFile
from hbat.engines.processes import is_main_process
from hbat.model.save import make_repository, upload


def check_upload(run: RunFile) -> None:
    """Raise ValueError if a run could not be uploaded as its file says. Asks the network for nothing."""
    if not run.push_to_hub:
        for key in ("hub_model_id", "hub_private_repo"):
            if (value := getattr(run, key)) is not None:
                raise ValueError(f"`{key}` is {value!r}, but nothing is uploaded. Set `push_to_hub: true`.")
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "`push_to_hub` is true, but HF_HUB_OFFLINE=1 keeps huggingface_hub off the network. Unset it, or set "
            "`push_to_hub: false`."
        )
    if get_token() is None:
        raise ValueError(
            "`push_to_hub` is true, but there is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN."
        )
    try:
        validate_repo_id(run.hub_model_id or _folder(run).name)
    except ValueError as error:
        raise ValueError(f"`hub_model_id` (default: the name of `output_dir`): {error}") from error


def begin_upload(run: RunFile) -> None:
    """Make the repository, as transformers does before it trains: not to learn after a run that one may not.

    Args:
        run: The run.

    Raises:
        ValueError: If there is none and it cannot be made.
    """
    if run.push_to_hub and is_main_process():
        try:
            make_repository(_folder(run), run.hub_model_id, private=run.hub_private_repo)
        except Exception as error:
            raise ValueError(f"`push_to_hub` is true, but the repository cannot be made: {error}") from error


def finish_upload(run: RunFile) -> str:
    """Upload a finished run, if its file says so, on the main process.

    Args:
        run: The run.

    Returns:
        Address of the commit, or an empty string.

    Raises:
        RuntimeError: If the upload failed; the message says where the model is and how to upload it.
    """
    if not run.push_to_hub or not is_main_process():
        return ""
    try:
        return upload(_folder(run), run.hub_model_id, private=run.hub_private_repo)
    except Exception as error:
        raise RuntimeError(
            f"The run is finished and its model is in {_folder(run)}, but the upload failed: {error}. Run `hbat train "
            "--resume` to upload it; nothing is trained again."
        ) from error


def _folder(run: RunFile) -> Path:
    return Path(run.config.output_dir).resolve()
