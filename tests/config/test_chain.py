"""The chain of a run: names of objectives, and their shares in every round."""

import pytest

from hbat import HBATConfig


def config(**options):
    return HBATConfig(output_dir="run", **options)


def test_a_repeated_objective_is_numbered():
    assert config(objectives=["sft", "dpo", "sft", "sft"]).objective_names == ["sft", "dpo", "sft_2", "sft_3"]


def test_a_repeated_objective_has_the_section_of_the_first_unless_it_has_its_own():
    own = {"name": "own", "trainer": "sft", "args": {"max_steps": 3}}
    made = config(objectives=["sft", "sft", own], sft={"max_steps": 7})
    assert [made.section(entry) for entry in made.objectives] == [{"max_steps": 7}, {"max_steps": 7}, {"max_steps": 3}]


def test_an_entry_with_the_name_of_a_section_has_it():
    made = config(objectives=[{"name": "sft", "trainer": "trl.SFTTrainer"}], sft={"max_steps": 7})
    assert made.section(made.objectives[0]) == {"max_steps": 7}


def test_shares_set_the_number_of_rounds():
    made = config(rounds=[{"sft": 0.5}, {"dpo": 1}, {"sft": 0.25}])
    assert made.num_rounds == 3
    assert made.shares == {"sft": (0.5, 0.0, 0.25), "dpo": (0.0, 1.0, 0.0)}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"objectives": [{"trainer": "sft"}]}, ValueError, r"a mapping needs a `name` and a `trainer`"),
        ({"objectives": [{"name": "code"}]}, ValueError, r"a mapping needs a `name` and a `trainer`"),
        ({"objectives": ["sft", {"name": "sft", "trainer": "sft"}]}, ValueError, r"give every objective a name of"),
        (
            {"objectives": [{"name": "data", "trainer": "sft"}]},
            ValueError,
            r"has the name 'data', which the run's state",
        ),
        ({"rounds": {"sft": 1}}, TypeError, r"`rounds` is \{'sft': 1\}; it must be a list of mappings such as"),
        ({"rounds": [0.5]}, TypeError, r"it must be a list of mappings"),
        ({"rounds": []}, ValueError, r"`rounds` lists 0 rounds"),
        ({"rounds": [{"sft": 1, "dpo": 1}], "num_rounds": 2}, ValueError, r"lists 1 rounds, but `num_rounds` is 2"),
        ({"rounds": [{"sft": 1, "dop": 1}]}, ValueError, r"`rounds\[0\]` names 'dop'.* Did you mean `dpo`\?"),
        ({"rounds": [{"sft": 1.5, "dpo": 1}]}, ValueError, r"`rounds\[0\]\.sft` is 1\.5"),
        ({"rounds": [{"sft": "all", "dpo": 1}]}, ValueError, r"`rounds\[0\]\.sft` is 'all'"),
        ({"rounds": [{"sft": 1, "dpo": 1}, {}]}, ValueError, r"`rounds\[1\]` is \{\}, which trains nothing"),
        ({"rounds": [{"sft": 0.7, "dpo": 1}, {"sft": 0.4}]}, ValueError, r"gives 'sft' a share of 1\.1 of its data"),
        ({"rounds": [{"sft": 1}]}, ValueError, r"gives 'dpo' a share of 0 of its data in all"),
    ],
)
def test_a_chain_that_cannot_be_meant_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        config(**options)


def test_tenths_add_up_to_one():
    assert config(rounds=[{"sft": 0.1, "dpo": 0.1}] * 10).num_rounds == 10
