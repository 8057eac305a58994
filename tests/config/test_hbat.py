import math
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbat.config.ewc import EWCConfig
from hbat.config.hbat import HBATConfig


def test_defaults_are_valid_and_need_only_a_folder():
    config = HBATConfig(output_dir="run")
    assert config.objective_names == ["sft", "dpo"]
    assert config.ewc == EWCConfig()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("", r"`continue_from` is ''; it must be a finished run's folder"),
        (3, r"`continue_from` is 3; it must be a finished run's folder"),
        ("run/../run", r"`continue_from` and `output_dir` are both 'run'; a run is continued in another folder"),
    ],
)
def test_a_run_continues_another_folder_than_its_own(folder, message):
    with pytest.raises(ValueError, match=message):
        HBATConfig(output_dir="run", continue_from=folder)


def test_the_folders_of_a_run_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = HBATConfig(output_dir="~/second", continue_from="~/first")
    assert (config.output_dir, config.continue_from) == (str(tmp_path / "second"), str(tmp_path / "first"))
    assert HBATConfig(output_dir="run", continue_from="~nobody-is-called-so/first").continue_from


# --- EWC -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "author"}, r"`ewc\.preset` is 'author'; the only preset is 'authors'"),
        ({"source": "fischer"}, r"`ewc\.source` is 'fischer', which is not one of .* Did you mean `fisher`\?"),
        ({"granularity": "layer"}, r"`ewc\.granularity` is 'layer', which is not one of 'tensor', 'element'"),
        ({"normalization": "maximum"}, r"`ewc\.normalization` is 'maximum'.* Did you mean `max`\?|'maximum', which"),
        ({"method": "proximate"}, r"`ewc\.method` is 'proximate'.* Did you mean `proximal`\?"),
        ({"estimator": "gbn"}, r"`ewc\.estimator` is 'gbn'.* Did you mean `gnb`\?"),
        ({"strength": -1}, r"`ewc\.strength` is -1; it must be a number of at least 0"),
        ({"strength": math.nan}, r"`ewc\.strength` is nan"),
        ({"strength": "10"}, r"`ewc\.strength` is '10'; it must be a number"),
        ({"strength": True}, r"`ewc\.strength` is True; it must be a number"),
        ({"damping": -0.5}, r"`ewc\.damping` is -0\.5; it must be a number of at least 0"),
        ({"damping": math.nan}, r"`ewc\.damping` is nan"),
        ({"importance_scale": -1.0}, r"`ewc\.importance_scale` is -1\.0"),
        ({"freeze": 1.5}, r"`ewc\.freeze` is 1\.5; it must be a number between 0 and 1"),
        ({"freeze": 1.0}, r"`ewc\.freeze` is 1\.0; it must be below 1"),
        ({"freeze": 1}, r"`ewc\.freeze` is 1; it must be below 1"),
        ({"fisher_samples": 0}, r"`ewc\.fisher_samples` is 0; it must be an integer of at least 1"),
        ({"fisher_batch_size": 0}, r"`ewc\.fisher_batch_size` is 0"),
        ({"normalization": "softmax"}, r"softmax` is taken over tensors, but `ewc\.granularity` is 'element'"),
        (
            {"preset": "authors", "freeze": 0.2},
            r"`ewc\.preset: authors` sets `ewc\.freeze` to 0\.0, but 0\.2 was given",
        ),
        ({"preset": "authors", "source": "fisher"}, r"sets `ewc\.source` to 'displacement', but 'fisher' was given"),
    ],
)
def test_a_wrong_ewc_option_is_named_with_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        EWCConfig(**options)


def test_the_authors_preset_sets_all_of_their_choices_and_keeps_the_strength():
    config = EWCConfig(preset="authors", strength=3.0)
    assert (config.source, config.granularity, config.normalization) == ("displacement", "tensor", "softmax")
    assert (config.importance_scale, config.method, config.freeze, config.strength) == (1e10, "gradient", 0.0, 3.0)


def test_the_help_of_the_authors_preset_says_all_that_it_sets():
    text = EWCConfig.__dataclass_fields__["preset"].metadata["help"]
    preset = EWCConfig(preset="authors")
    for name in ("source", "granularity", "normalization", "method"):
        assert f"`{name}: {getattr(preset, name)}`" in text
    assert "`importance_scale: 1e10`" in text
    assert "`freeze: 0`" in text
    assert "examples/configs/authors.yaml" in text


def test_the_authors_preset_may_be_spelled_out_beside_it():
    assert EWCConfig(preset="authors", normalization="softmax", granularity="tensor") == EWCConfig(preset="authors")


@given(st.floats(0, 1e6), st.floats(0, 1, exclude_max=True))
def test_any_number_in_range_is_accepted(strength, freeze):
    config = EWCConfig(strength=strength, freeze=freeze)
    assert (config.strength, config.freeze) == (strength, freeze)


# --- run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": ""}, r"`output_dir` is ''; it must be the path of a directory"),
        ({"output_dir": 3}, r"`output_dir` is 3; it must be the path of a directory"),
        ({"num_rounds": 0}, r"`num_rounds` is 0; it must be an integer of at least 1"),
        ({"num_rounds": 2.0}, r"`num_rounds` is 2\.0; it must be an integer"),
        ({"num_rounds": True}, r"`num_rounds` is True; it must be an integer"),
        ({"keep_states": 0}, r"`keep_states` is 0; it must be an integer of at least 1"),
        ({"seed": -1}, r"`seed` is -1; it must be an integer of at least 0"),
        ({"seed": 0.5}, r"`seed` is 0\.5; it must be an integer"),
        ({"objectives": []}, r"`objectives` is \[\]; it must be a list such as"),
        ({"objectives": "sft"}, r"`objectives` is 'sft'; it must be a list such as"),
        ({"optimizer_state": "keep"}, r"`optimizer_state` is 'keep', which is not one of 'reset', 'carry'"),
        ({"on_bad_rows": "dorp"}, r"`on_bad_rows` is 'dorp'.* Did you mean `drop`\?"),
        ({"on_nan": "rolback"}, r"`on_nan` is 'rolback', which is not one of 'stop', 'rollback'.* Did you mean"),
        ({"max_rollbacks": -1}, r"`max_rollbacks` is -1; it must be an integer of at least 0"),
        ({"lr_schedule": "stages"}, r"`lr_schedule` is 'stages'.* Did you mean `stage`\?"),
        ({"lr_schedule": {"dpo": "decline"}}, r"`lr_schedule` is 'decline'"),
        ({"lr_schedule": {"dop": "run"}}, r"`lr_schedule` names the objective 'dop'.* Did you mean `dpo`\?"),
        ({"end_weight": 1.5}, r"`end_weight` is 1\.5; it must be a number between 0 and 1"),
        ({"end_weight": -0.1}, r"`end_weight` is -0\.1; it must be a number between 0 and 1"),
        ({"end_weight": float("nan")}, r"`end_weight` is nan; it must be a number between 0 and 1"),
        ({"end_weight": {"dpo": 0.5}}, r"`end_weight` is \{'dpo': 0\.5\}; it must be a number between 0 and 1"),
        ({"ewc": {"strenght": 1.0}}, r"`ewc\.strenght` is not an option.* Did you mean `strength`\?"),
        ({"ewc": {"strength": -1.0}}, r"`ewc\.strength` is -1\.0"),
        ({"replay": {"sft": 1.5}}, r"`replay\.sft` is 1\.5; it must be a number between 0 and 1"),
        ({"replay": {"sft": -0.1}}, r"`replay\.sft` is -0\.1; it must be a number between 0 and 1"),
        ({"replay": {"sft": math.nan}}, r"`replay\.sft` is nan; it must be a number between 0 and 1"),
        ({"replay": {"sft": None}}, r"`replay\.sft` is None; it must be a number between 0 and 1"),
        ({"replay": {"dpo": 0.1}}, r"`replay` names 'dpo'; only rows of 'sft' can be replayed, whose loss needs no"),
        ({"replay": {"stf": 0.1}}, r"`replay` names 'stf'; only rows of 'sft'"),
        (
            {"replay": {"sft": 0.1}, "objectives": ["dpo", "kto"]},
            r"`replay` needs the built-in objective 'sft', but `objectives` is \['dpo', 'kto'\]",
        ),
    ],
)
def test_a_wrong_option_of_the_run_is_named_with_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        HBATConfig(**{"output_dir": "run"} | options)


def test_an_ewc_section_of_a_wrong_type_is_refused():
    with pytest.raises(TypeError, match=r"`ewc` is a float; it must be a mapping, an `EWCConfig` or null"):
        HBATConfig(output_dir="run", ewc=10.0)


def test_replay_of_a_wrong_type_is_refused():
    with pytest.raises(TypeError, match=r"`replay` is 0\.1; it must be a mapping such as \{'sft': 0\.1\}, or null"):
        HBATConfig(output_dir="run", replay=0.1)


def test_no_replay_and_an_empty_mapping_are_a_share_of_zero():
    shares = [HBATConfig(output_dir="run", replay=each).replay_share for each in (None, {}, {"sft": 0}, {"sft": 1})]
    assert shares == [0.0, 0.0, 0.0, 1.0]


def test_the_ewc_section_may_be_a_mapping_an_object_or_nothing():
    assert HBATConfig(output_dir="run", ewc={"strength": 2.0}).ewc == EWCConfig(strength=2.0)
    assert HBATConfig(output_dir="run", ewc=EWCConfig(strength=2.0)).ewc == EWCConfig(strength=2.0)
    assert HBATConfig(output_dir="run", ewc=None).ewc is None


def test_one_word_holds_for_all_objectives_and_a_mapping_for_those_it_names():
    config = HBATConfig(output_dir="run", lr_schedule="run")
    assert [config.lr_schedule_of(name) for name in ("sft", "dpo")] == ["run", "run"]
    config = HBATConfig(output_dir="run", lr_schedule={"dpo": "decay"})
    assert [config.lr_schedule_of(name) for name in ("sft", "dpo")] == ["stage", "decay"]


def test_an_objective_of_ones_own_counts_by_its_name():
    own = types.SimpleNamespace(name="distill")
    config = HBATConfig(output_dir="run", objectives=["sft", own], lr_schedule={"distill": "run"})
    assert config.objective_names == ["sft", "distill"]
    assert config.lr_schedule_of("distill") == "run"


def test_two_configurations_share_nothing_that_can_change():
    first, second = HBATConfig(output_dir="a"), HBATConfig(output_dir="b")
    assert first.objectives is not second.objectives
    assert first.ewc is not second.ewc
