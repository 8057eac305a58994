import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import TWO_ROUNDS, matrix

from hbat.reports.matrix import ForgettingMatrix, as_metrics, directions, markdown_table, scores, table_rows

# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_numbers_without_prefix_and_run_times():
    metrics = {
        "eval_loss": 1.5, "eval_rewards/margins": -2, "eval_runtime": 3.0, "eval_samples_per_second": 9.0,
        "eval_steps_per_second": 2.0, "epoch": 1.0, "eval_num_tokens": 77.0, "eval_model_preparation_time": 0.1,
        "eval_name": "text", "eval_flag": True, "eval_nothing": None, "accuracy": 1,
    }  # fmt: skip
    found = scores(metrics)
    assert found == {"loss": 1.5, "rewards/margins": -2.0, "accuracy": 1.0}
    assert all(type(score) is float for score in found.values())


# --- backward transfer, forgetting and interference ------------------------------------------------------------------


def test_backward_transfer_equals_the_computation_by_hand():
    # sft: after its last stage 1.0, at the end 1.75; what its second stage did (2.5 -> 1.0) is training, not transfer.
    # dpo: nothing follows its last stage.
    assert matrix(*TWO_ROUNDS).backward_transfer() == {"sft": 1.0 - 1.75}
    one_more = matrix(*TWO_ROUNDS, ("sft", {"sft": 0.5, "dpo": 0.375}))
    assert one_more.backward_transfer() == {"dpo": 0.25 - 0.375}


def test_backward_transfer_is_negative_for_damage_and_positive_for_help():
    found = matrix(("sft", {"sft": 1.0}), ("dpo", {"sft": 3.0})).backward_transfer()
    assert found == {"sft": -2.0}
    assert matrix(("sft", {"sft": 3.0}), ("dpo", {"sft": 1.0})).backward_transfer() == {"sft": 2.0}


def test_forgetting_equals_the_computation_by_hand():
    # sft: best after its second stage, 1.0, at the end 1.75. dpo: best before the end 0.4, at the end 0.25.
    assert matrix(*TWO_ROUNDS).forgetting() == pytest.approx({"sft": 1.75 - 1.0, "dpo": 0.25 - 0.4})
    one_more = matrix(*TWO_ROUNDS, ("sft", {"sft": 2.25, "dpo": 0.375}))
    assert one_more.forgetting() == {"sft": 2.25 - 1.0, "dpo": 0.375 - 0.25}


def test_the_best_is_of_stages_of_any_objective_but_not_of_the_start():
    found = matrix((None, {"sft": 0.5}), ("sft", {"sft": 2.0}), ("dpo", {"sft": 1.0}), ("dpo", {"sft": 1.5}))
    assert found.forgetting() == {"sft": 1.5 - 1.0}


def test_nothing_is_forgotten_of_what_only_the_last_stage_trained():
    assert set(matrix(*TWO_ROUNDS[:3]).forgetting()) == {"sft"}


def test_a_score_on_the_way_that_is_not_a_number_is_not_the_best():
    for earlier in ([math.nan, 1.0], [1.0, math.nan]):
        rows = [("sft", {"sft": value}) for value in earlier]
        assert matrix(*rows, ("dpo", {"sft": 3.0})).forgetting() == {"sft": 2.0}


def test_interference_equals_the_computation_by_hand():
    # sft over the two stages of dpo: +0.5, +0.75. dpo over the two stages of sft: +0.2, +0.1.
    assert matrix(*TWO_ROUNDS).interference() == pytest.approx({"sft": 0.625, "dpo": 0.15})


def test_a_single_stage_has_no_transfer_and_interferes_with_the_other_objective_only():
    found = matrix(*TWO_ROUNDS[:2])
    assert found.backward_transfer() == found.forgetting() == {}
    assert found.interference() == pytest.approx({"dpo": 0.2})


def test_an_empty_matrix_says_nothing():
    found = matrix()
    assert (found.backward_transfer(), found.forgetting(), found.interference()) == ({}, {}, {})
    assert (found.lines(), found.series("sft")) == ([], [])


def test_an_objective_without_evaluations_is_left_out():
    rows = [(name, {"sft": losses["sft"]}) for name, losses in TWO_ROUNDS]
    found = matrix(*rows)
    assert set(found.backward_transfer()) == set(found.forgetting()) == set(found.interference()) == {"sft"}
    assert found.series("dpo") == [None] * 5


def test_a_missing_score_at_the_end_leaves_no_transfer():
    found = matrix(*TWO_ROUNDS[:-1], ("dpo", {"dpo": 0.25}))
    assert found.backward_transfer() == {}
    assert set(found.forgetting()) == {"dpo"}


def test_missing_scores_on_the_way_are_skipped():
    rows = list(TWO_ROUNDS)
    rows[1] = ("sft", {"dpo": 0.9})  # sft was not evaluated after its first stage
    found = matrix(*rows)
    assert found.forgetting()["sft"] == pytest.approx(1.75 - 1.0)
    assert found.interference()["sft"] == pytest.approx(1.75 - 1.0)  # its value before the first dpo stage is missing


def test_without_a_score_after_the_last_own_stage_there_is_no_transfer():
    rows = list(TWO_ROUNDS)
    rows[3] = ("sft", {"dpo": 0.5})
    assert matrix(*rows).backward_transfer() == {}
    assert matrix(*rows).forgetting()["sft"] == 1.75 - 2.0


def test_three_objectives_each_forget_over_the_two_others():
    headline = {"sft": "loss", "dpo": "loss", "kto": "loss"}
    found = matrix(("sft", {"sft": 1.0}), ("dpo", {"sft": 1.5}), ("kto", {"sft": 1.25}), headline=headline)
    assert found.backward_transfer() == {"sft": -0.25}
    assert found.interference() == {"sft": 0.125}


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=9), st.floats(-50, 50))
def test_a_shift_of_all_scores_changes_no_measure(values, shift):
    def build(offset):
        rows = [("sft" if index % 2 else "dpo", {"sft": value + offset}) for index, value in enumerate(values)]
        return matrix(*rows)

    for measure in ("backward_transfer", "forgetting", "interference"):
        assert getattr(build(shift), measure)() == pytest.approx(getattr(build(0.0), measure)(), abs=1e-9)


def test_where_higher_is_better_the_signs_turn_and_keep_their_meaning():
    rows = [("sft", {"sft": 1.0}), ("ppo", {"sft": 3.0, "ppo": 0.5}), ("sft", {"sft": 2.0, "ppo": 0.25})]
    found = ForgettingMatrix({"sft": "loss", "ppo": "reward"}, better={"ppo": "higher"})
    for index, (objective, values) in enumerate(rows):
        given_scores = {name: {found.headline[name]: value} for name, value in values.items()}
        found.add(stage=index, round_number=1, objective=objective, scores=given_scores)
    assert found.backward_transfer() == {"ppo": 0.25 - 0.5}
    assert found.forgetting() == {"sft": 2.0 - 1.0, "ppo": 0.5 - 0.25}
    assert found.interference() == {"sft": 3.0 - 1.0, "ppo": 0.5 - 0.25}
    assert found.as_dict()["better"] == {"sft": "lower", "ppo": "higher"}


def test_scores_are_named_as_transformers_names_those_of_several_data_sets():
    assert as_metrics({"sft": {"loss": 1.0}, "ppo": {"reward": 2.0}}) == {"eval_sft/loss": 1.0, "eval_ppo/reward": 2.0}


# --- rows, lines, files ----------------------------------------------------------------------------------------------


def test_a_series_takes_the_headline_metric():
    found = ForgettingMatrix({"dpo": "rewards/margins"})
    found.add(stage=0, round_number=1, objective="dpo", scores={"dpo": {"loss": 1.0, "rewards/margins": 3.0}})
    found.add(stage=1, round_number=1, objective="sft", scores={"dpo": {"loss": 2.0}})
    assert found.series("dpo") == [3.0, None]


def test_a_stage_is_known_once_it_was_added():
    found = matrix(*TWO_ROUNDS[:2])
    assert [found.has(stage) for stage in (-1, 0, 1)] == [True, True, False]


def test_lines_name_rounds_from_one_and_keep_the_order_of_objectives():
    assert matrix(*TWO_ROUNDS).lines() == [
        ("start", [4.0, 0.7]),
        ("round 1: sft", [2.0, 0.9]),
        ("round 1: dpo", [2.5, 0.4]),
        ("round 2: sft", [1.0, 0.5]),
        ("round 2: dpo", [1.75, 0.25]),
    ]


def test_rows_do_not_follow_what_was_handed_in():
    given_scores = {"sft": {"loss": 1.0}}
    found = ForgettingMatrix({"sft": "loss"})
    found.add(stage=0, round_number=1, objective="sft", scores=given_scores)
    given_scores["dpo"] = {"loss": 2.0}
    assert found.rows[0]["scores"] == {"sft": {"loss": 1.0}}


def test_a_matrix_survives_json():
    found = matrix(*TWO_ROUNDS)
    plain = json.loads(json.dumps(found.as_dict()))
    again = ForgettingMatrix(plain["headline"], plain["rows"])
    assert again == found
    for measure in ("backward_transfer", "forgetting", "interference"):
        assert plain[measure] == getattr(found, measure)()


def test_a_score_that_is_not_a_number_stays_visible():
    found = matrix(("sft", {"sft": math.nan}), ("dpo", {"sft": 1.0}))
    assert math.isnan(found.backward_transfer()["sft"])
    found = matrix(("sft", {"sft": 1.0}), ("dpo", {"sft": math.nan}))
    assert math.isnan(found.forgetting()["sft"])


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_every_row_and_for_backward_transfer_and_forgetting():
    assert markdown_table(matrix(*TWO_ROUNDS)).splitlines() == [
        "| after | sft loss | dpo loss |",
        "|---|---:|---:|",
        "| start | 4.0000 | 0.7000 |",
        "| round 1: sft | 2.0000 | 0.9000 |",
        "| round 1: dpo | 2.5000 | 0.4000 |",
        "| round 2: sft | 1.0000 | 0.5000 |",
        "| round 2: dpo | 1.7500 | 0.2500 |",
        "| backward transfer | -0.7500 |  |",
        "| forgetting | +0.7500 | -0.1500 |",
    ]


def test_cells_are_texts_and_as_many_in_every_row():
    head, rows = table_rows(matrix(*TWO_ROUNDS))
    assert head == ["after", "sft loss", "dpo loss"]
    assert rows[0] == ["start", "4.0000", "0.7000"]
    assert rows[-2:] == [["backward transfer", "-0.7500", ""], ["forgetting", "+0.7500", "-0.1500"]]
    assert {len(cells) for cells in rows} == {3}


def test_missing_scores_are_empty_cells():
    lines = markdown_table(matrix(("sft", {"sft": 1.0}), ("dpo", {"dpo": 2.0}))).splitlines()
    assert lines[2:] == [
        "| round 1: sft | 1.0000 |  |",
        "| round 1: dpo |  | 2.0000 |",
        "| backward transfer |  |  |",
        "| forgetting |  |  |",
    ]


def test_an_objective_that_was_not_evaluated_has_no_column():
    lines = markdown_table(matrix(("sft", {"sft": 1.0}), ("dpo", {"sft": 2.0}))).splitlines()
    assert [line.count("|") for line in lines] == [3] * 6
    assert lines[0] == "| after | sft loss |"


@pytest.mark.parametrize("rows", [TWO_ROUNDS[:1], TWO_ROUNDS[:2], TWO_ROUNDS])
def test_every_line_has_as_many_cells_as_the_head(rows):
    counts = {line.count("|") for line in markdown_table(matrix(*rows)).splitlines()}
    assert counts == {4}


def test_words_say_which_scores_are_better():
    headline = {"sft": "loss", "ppo": "reward", "dpo": "loss", "kto": "loss"}
    mixed = ForgettingMatrix(headline, better={"ppo": "higher"})
    for names, text in ((["sft"], "lower is better"), (["ppo"], "higher is better")):
        mixed.rows = [{"scores": {name: {headline[name]: 1.0} for name in names}, "objective": None}]
        assert directions(mixed) == text
    mixed.rows = [{"scores": {name: {headline[name]: 1.0} for name in ("sft", "ppo", "dpo")}, "objective": None}]
    assert directions(mixed) == "lower is better for sft and dpo, higher is better for ppo"
