import types

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from hbat.model.save import upload

KEPT = {"README.md", "model.safetensors", "evaluation.json", "evaluation.png", "tokenizer.json"}
PRIVATE = {
    "hbat_state.json", "trainer_state.json", "state/weights-003.safetensors", "runs/events.out",
    "stage-002-sft/checkpoint-4/optimizer.pt", "hbat_state.json.tmp",
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """What the host's client was asked for; nothing leaves the machine."""
    asked = []

    class Client:
        def create_repo(self, repo_id, **options):
            asked.append(("create", repo_id, options))
            return types.SimpleNamespace(repo_id=f"user/{repo_id}")

        def upload_folder(self, **options):
            asked.append(("upload", options))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    return asked


def test_a_run_uploads_its_model_card_and_results_and_nothing_else(calls, tmp_path):
    assert upload(tmp_path / "run", None, private=True) == "address"
    (_, name, options), (_, uploaded) = calls
    assert (name, options["private"], uploaded["repo_id"]) == ("run", True, "user/run")
    kept = filter_repo_objects(sorted(KEPT | PRIVATE), ignore_patterns=uploaded["ignore_patterns"])
    assert set(kept) == KEPT


def test_the_repository_can_be_named(calls, tmp_path):
    upload(tmp_path, "mine", private=None)
    assert calls[0][1] == "mine"
