"""What counts as another run, and what may change within one."""

import pytest

from hbat.state.changes import Change, accepted, changes
from hbat.state.fingerprint import Fingerprint
from hbat.state.manifest import RunStateError

BEFORE = {
    "run": {"objectives": ["sft", "dpo"], "num_rounds": 2, "seed": 1, "processes": 1, "end_weight": 1.0},
    "ewc": {"strength": 1.0, "source": "displacement", "granularity": "element"},
    "data": {"sft": {"rows": 8, "columns": ["a"], "content": "x"}},
    "parameters": {"tensors": 3, "shapes": "y"},
    "tokenizer": {"vocabulary": "v", "template": "t"},
    "sft": {"learning_rate": 1.0, "max_steps": 3},
    "dpo": {"beta": 0.1},
}


def with_(**values):
    """The fingerprint with other values at dotted names."""
    now = {section: dict(content) for section, content in BEFORE.items()}
    for name, value in values.items():
        *path, last = name.split("__")
        place = now
        for key in path:
            place[key] = dict(place[key])
            place = place[key]
        place[last] = value
    return now


def accept(now, *allowed):
    before, after = (Fingerprint(values, {}, {}) for values in (BEFORE, now))
    return [str(change) for change in accepted(before, after, allowed, output_dir="run")]


# --- what changed ----------------------------------------------------------------------------------------------------


def lines(before, now):
    return [str(change) for change in changes(before, now)]


def test_changes_are_sorted_and_dotted_and_show_what_came_and_went():
    before = {"b": 1, "a": {"x": 1, "y": {"z": [1]}}, "gone": 3}
    now = {"b": 2, "a": {"x": 1, "y": {"z": [2]}}, "new": None, "come": 0}
    assert lines(before, now) == ["a.y.z: [1] -> [2]", "b: 1 -> 2", "come: None -> 0", "gone: 3 -> None"]


def test_a_section_that_became_a_value_is_one_change():
    assert lines({"ewc": {"strength": 1}}, {"ewc": None}) == ["ewc: {'strength': 1} -> None"]


# --- what may --------------------------------------------------------------------------------------------------------


def test_nothing_changed_is_nothing_to_accept():
    assert accept(BEFORE) == []
    assert accept(BEFORE, "sft.learning_rate", "ewc.", "run.num_rounds") == []


def test_named_values_may_change_alone_or_by_their_beginning():
    now = with_(sft__learning_rate=2.0, sft__max_steps=4, dpo__beta=0.2)
    everything = ["dpo.beta: 0.1 -> 0.2", "sft.learning_rate: 1.0 -> 2.0", "sft.max_steps: 3 -> 4"]
    assert accept(now, "sft.", "dpo.beta") == everything
    assert accept(now, "dpo.beta", "sft.max_steps", "sft.learning_rate") == everything


def test_all_else_is_refused_with_the_full_list_and_what_could_be_allowed():
    now = with_(sft__learning_rate=2.0, sft__max_steps=4, dpo__beta=0.2, run__num_rounds=3)
    with pytest.raises(RunStateError) as raised:
        accept(now, "sft.max_steps")
    assert str(raised.value) == (
        "`output_dir` 'run' holds another run: dpo.beta: 0.1 -> 0.2; run.num_rounds: 2 -> 3; sft.learning_rate: 1.0 "
        "-> 2.0. Values may change that `allow_changed` names, here dpo.beta, sft.learning_rate (`--allow-changed`). "
        "Restore these values to resume it, or choose another folder."
    )


FIXED = {
    "run.objectives": (with_(run__objectives=["dpo"]), "the plan of the stages is made of them"),
    "run.num_rounds": (with_(run__num_rounds=3), "the data sets are cut into that many parts"),
    "run.seed": (with_(run__seed=3), "it cuts the data sets into parts"),
    "ewc": (with_(ewc=None), "`ewc.strength: 0` switches the penalty off"),
    "ewc.source": (with_(ewc__source="fisher"), "of another kind"),
    "ewc.granularity": (with_(ewc__granularity="tensor"), "of another kind"),
    "data.sft.rows": (with_(data__sft__rows=9), "rows of earlier ones"),
    "data.sft.columns": (with_(data__sft__columns=["b"]), "mean something else"),
    "parameters.shapes": (with_(parameters__shapes="z"), "not those of this model"),
    "tokenizer.vocabulary": (with_(tokenizer__vocabulary="w"), "the tokens mean something else"),
}


@pytest.mark.parametrize(("name", "now", "why"), [(name, *rest) for name, rest in FIXED.items()], ids=FIXED)
def test_what_would_train_garbage_cannot_be_allowed(name, now, why):
    prefix = name.split(".")[0] + "."
    for allowed in (name, prefix) if "." in name else (name,):
        with pytest.raises(RunStateError, match=rf"`{name}` cannot change within a run: .*{why}\. Restore"):
            accept(now, allowed)


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("data.sft.content", with_(data__sft__content="other")),
        ("run.processes", with_(run__processes=2)),
        ("run.end_weight", with_(run__end_weight=0.5)),
        ("tokenizer.template", with_(tokenizer__template="u")),
        ("ewc.strength", with_(ewc__strength=0)),
    ],
)
def test_the_rest_can_be_allowed(name, now):
    assert len(accept(now, name)) == 1
    with pytest.raises(RunStateError, match=f"here {name} "):
        accept(now)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sft.learning_rat", "sft.learning_rate"),
        ("sft", "sft."),
        ("ewc.strenght", "ewc.strength"),
        ("dpo.betas", "dpo.beta"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, meant):
    with pytest.raises(RunStateError, match=rf"names '{name}', which is not a setting of this run\..*`{meant}`"):
        accept(BEFORE, name)


def test_a_section_that_only_one_of_the_runs_has_is_allowed_as_it_is_named():
    assert accept(BEFORE | {"kto": {"beta": 1}}, "kto") == ["kto: None -> {'beta': 1}"]
    assert accept(with_(dpo__betas=3) | {"run": BEFORE["run"] | {"rewards": ["x"]}}, "run.rewards", "dpo.betas") == [
        "run.rewards: None -> ['x']"  # of TRL's fields only those that both have are compared
    ]


@pytest.mark.parametrize(
    ("name", "concerned"),
    [
        ("sft.learning_rate", True), ("dpo.beta", False), ("run.processes", True), ("ewc.strength", True),
        ("data.sft.content", True), ("data.dpo.content", False), ("tokenizer.template", True),
    ],
)  # fmt: skip
def test_a_change_concerns_the_stages_of_its_objective_or_all(name, concerned):
    assert Change(name, 1, 2).concerns("sft", ["sft", "dpo"]) is concerned


# --- defaults of a library that moved --------------------------------------------------------------------------------


OLD = {"trl": "1.2.0", "torch": "2.9.0"}
NEW = {"trl": "1.3.0", "torch": "2.9.0", "peft": "0.18.0"}


def resume(now, *allowed, given_before=(), given_now=(), versions=NEW):
    before = Fingerprint(BEFORE, {"sft": [*given_before], "dpo": []}, OLD)
    after = Fingerprint(now, {"sft": [*given_now], "dpo": []}, versions)
    return [str(change) for change in accepted(before, after, allowed, output_dir="run")]


def test_a_default_that_moved_is_named_with_both_versions_and_is_no_other_run():
    with pytest.raises(RunStateError) as raised:
        resume(with_(sft__learning_rate=2.0, dpo__beta=0.2))
    assert str(raised.value) == (
        "Defaults have changed since the run in `output_dir` 'run' was saved (peft none -> 0.18.0, trl 1.2.0 -> "
        "1.3.0): dpo.beta: 0.1 -> 0.2; sft.learning_rate: 1.0 -> 2.0. Set the old values explicitly to keep them, or "
        "accept the new ones with `allow_changed` (`--allow-changed dpo.beta,sft.learning_rate`)."
    )


def test_a_default_that_moved_can_be_kept_or_accepted():
    assert resume(BEFORE, given_now=["learning_rate"]) == []
    moved = with_(sft__learning_rate=2.0)
    assert resume(moved, "sft.learning_rate") == resume(moved, "sft.") == ["sft.learning_rate: 1.0 -> 2.0"]


@pytest.mark.parametrize(
    "given", [{"given_before": ["learning_rate"]}, {"given_now": ["learning_rate"]}, {"versions": OLD}]
)
def test_a_value_that_was_given_on_either_side_or_came_with_no_other_version_is_no_default_that_moved(given):
    with pytest.raises(RunStateError, match=r"another run: sft\.learning_rate: 1\.0 -> 2\.0\. ") as raised:
        resume(with_(sft__learning_rate=2.0), **given)
    assert "Defaults" not in str(raised.value)


def test_a_field_of_a_field_is_given_with_it():
    nested = BEFORE | {"dpo": {"beta": 0.1, "options": {"a": 1}}}, BEFORE | {"dpo": {"beta": 0.1, "options": {"a": 2}}}
    for given, message in (
        (["options"], "another run: dpo.options.a: 1 -> 2"),
        ([], "Defaults .*: dpo.options.a: 1 ->"),
    ):
        before, now = (Fingerprint(*both) for both in zip(nested, [{"dpo": given}] * 2, (OLD, NEW), strict=True))
        with pytest.raises(RunStateError, match=message):
            accepted(before, now, [], output_dir="run")


def test_a_changed_value_and_a_default_that_moved_are_told_apart():
    with pytest.raises(
        RunStateError, match=r"another run: run\.processes: 1 -> 2 .*\. Defaults .*: dpo\.beta: 0\.1 -> "
    ):
        resume(with_(run__processes=2, dpo__beta=0.2))
