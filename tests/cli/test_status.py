"""With which status the command line ends, and what its one line says."""

import types

import pytest

from hbat.cli import build as assembly
from hbat.cli.main import main
from hbat.state.files import StorageError
from hbat.state.manifest import RunStateError


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run `hbat train` with a trainer that fails; returns its status and its error output."""

    def run(*words, **failures):
        def fail(step):
            def call(*args, **kwargs):
                if step in failures:
                    raise failures[step]

            return call

        def build(_):
            fail("build")()
            return types.SimpleNamespace(train=fail("train"), save_model=fail("save"), add_callback=fail("callback"))

        monkeypatch.setattr(assembly, "build_trainer", build)
        file = tmp_path / "run.yaml"
        file.write_text(
            f"model_name_or_path: none\noutput_dir: {tmp_path / 'out'}\ndatasets: {{sft: a.jsonl, dpo: b.jsonl}}\n"
        )
        status = main(["train", "--config", str(file), *words])
        captured = capsys.readouterr()
        assert captured.out == ""
        return status, captured.err

    return run


USER_ERRORS = [ValueError("it is wrong"), TypeError("it is wrong"), KeyError("it is wrong"), OSError("it is wrong")]
every_user_error = pytest.mark.parametrize("error", USER_ERRORS, ids=lambda error: type(error).__name__)


@every_user_error
def test_what_is_wrong_with_the_run_before_it_trains_has_status_2(error, train):
    assert train(build=error) == (2, "hbat: error: it is wrong\n")


@every_user_error
@pytest.mark.parametrize("step", ["train", "save"])
def test_what_goes_wrong_in_training_has_status_1_and_is_named(step, error, train):
    expected = f"hbat: error: {type(error).__name__}: it is wrong (use `--traceback` for details)\n"
    assert train(**{step: error}) == (1, expected)


def test_a_folder_that_the_run_cannot_resume_from_has_status_2_in_training_too(train):
    assert train(train=RunStateError("another run")) == (2, "hbat: error: another run\n")


def test_a_full_disk_speaks_for_itself(train):
    assert train(train=StorageError("no room")) == (2, "hbat: error: no room\n")
    assert train(save=StorageError("no room")) == (2, "hbat: error: no room\n")


def test_a_loss_that_is_not_finite_speaks_for_itself(train):
    assert train(train=FloatingPointError("The loss\nis not finite")) == (1, "hbat: error: The loss is not finite\n")


def test_the_traceback_of_training_is_that_of_the_error_itself(train):
    status, shown = train("--traceback", train=ValueError("shapes differ"))
    assert status == 1
    assert shown.startswith("Traceback")
    assert "_TrainingError" not in shown
    assert shown.endswith("hbat: error: ValueError: shapes differ (use `--traceback` for details)\n")
