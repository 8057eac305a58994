"""`push_to_hub` of a run file: what is refused before the run, and what is uploaded after it. Nothing is sent."""

import types

import huggingface_hub
import pytest
import run_files
import yaml

from hbat.cli.main import main


@pytest.fixture
def calls(monkeypatch):
    """What the Hub was asked for, by a client that is logged in; those in `failing` fail."""
    asked = []

    class Client:
        failing = ()

        def create_repo(self, repo_id, **options):
            self._answer("create", repo_id, options)
            return types.SimpleNamespace(repo_id=f"user/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            self._answer("upload", repo_id, sorted(path.name for path in folder_path.iterdir()))
            return "https://address"

        def _answer(self, name, *arguments):
            asked.append((name, *arguments))
            if name in Client.failing:
                raise ConnectionError(f"no {name}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return types.SimpleNamespace(asked=asked, client=Client)


@pytest.fixture
def hbat(tmp_path, capsys):
    """Run the command line on a small run of SFT; returns its status, its output and its error line."""
    file = run_files.write(tmp_path, run_files.save_model(tmp_path / "model"))
    values = yaml.safe_load(file.read_text()) | {"objectives": ["sft"]}
    del values["dpo"], values["datasets"]["dpo"]
    file.write_text(yaml.safe_dump(values))

    def run(command, *words):
        status = main([command, "--config", str(file), *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.rstrip().rpartition("\n")[2]

    return run


PUSH = ("--push_to_hub", "--hub_model_id", "org/name", "--hub_private_repo")


def test_a_run_is_uploaded_at_its_end(hbat, calls):
    status, out, _ = hbat("train", *PUSH)
    assert status == 0
    assert out.endswith("Hub:    https://address\n")
    made, uploaded = calls.asked
    assert made == ("create", "org/name", {"private": True, "exist_ok": True})
    assert uploaded[:2] == ("upload", "user/org/name")
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(uploaded[2])
    assert "hf_secret" not in out


def test_a_run_that_does_not_ask_for_it_is_not_uploaded(hbat, calls):
    status, out, _ = hbat("train")
    assert (status, calls.asked) == (0, [])
    assert "Hub:" not in out


def test_validation_asks_the_hub_for_nothing(hbat, calls):
    assert hbat("validate", *PUSH)[0] == 0
    assert calls.asked == []


@pytest.mark.parametrize("failing", ["create", "upload"])
def test_an_upload_that_fails_leaves_the_model_and_resuming_uploads_it(failing, hbat, calls, tmp_path):
    calls.client.failing = (failing,)
    status, out, line = hbat("train", *PUSH)
    assert status == 1
    assert f"Model:  {tmp_path / 'out'}" in out
    assert (
        f"its model is in {tmp_path / 'out'}, but the upload failed: no {failing}. Run `hbat train --resume`" in line
    )
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    calls.client.failing = ()
    assert hbat("train", "--resume", *PUSH)[1].endswith("Hub:    https://address\n")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["train", "validate"])
@pytest.mark.parametrize(
    ("words", "change", "says"),
    [
        (PUSH, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE=1 keeps huggingface_hub off the network."),
        (PUSH, "HF_TOKEN", "there is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN."),
        (["--push_to_hub", "--hub_model_id", "a/b/c"], "", "(default: the name of `output_dir`): Repo id must be"),
        (["--push_to_hub", "--output_dir", "my run"], "", "(default: the name of `output_dir`): Repo id must"),
        (PUSH[1:3], "", "`hub_model_id` is 'org/name', but nothing is uploaded. Set `push_to_hub: true`."),
        (PUSH[3:], "", "`hub_private_repo` is True, but nothing is uploaded. Set `push_to_hub: true`."),
    ],
)  # fmt: skip
def test_what_cannot_be_uploaded_is_refused_before_the_model_is_loaded(
    command, words, change, says, hbat, calls, tmp_path, monkeypatch
):
    (tmp_path / "model" / "config.json").unlink()  # so that loading it would be another error
    if change == "HF_HUB_OFFLINE":
        monkeypatch.setattr(huggingface_hub.constants, change, True)
    elif change:
        monkeypatch.delenv(change)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    status, out, line = hbat(command, *words)
    assert (status, out, calls.asked) == (2, "", [])
    assert says in line
