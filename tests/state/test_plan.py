import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbat.state.plan import part_indices, plan


@st.composite
def cuts(draw):
    """(rows, rounds, seed) with at least one row for every round."""
    num_rounds = draw(st.integers(1, 12))
    return draw(st.integers(num_rounds, 200)), num_rounds, draw(st.integers(0, 2**32))


def parts(num_rows, num_rounds, seed):
    return [part_indices(num_rows, num_rounds, index, seed) for index in range(num_rounds)]


@given(cuts())
def test_parts_hold_every_row_exactly_once(cut):
    assert sorted(row for part in parts(*cut) for row in part) == list(range(cut[0]))


@given(cuts())
def test_parts_differ_by_at_most_one_row(cut):
    sizes = [len(part) for part in parts(*cut)]
    assert max(sizes) - min(sizes) <= 1


@given(cuts())
def test_the_same_seed_cuts_the_same_parts(cut):
    assert parts(*cut) == parts(*cut)


@given(cuts())
def test_rows_keep_their_order_within_a_part(cut):
    assert all(part == sorted(part) for part in parts(*cut))


@given(st.integers(1, 200), st.integers(0, 2**32))
def test_a_single_round_trains_on_the_data_set_as_it_is(num_rows, seed):
    assert part_indices(num_rows, 1, 0, seed) == list(range(num_rows))


def test_the_last_of_all_stages_alone_is_the_last():
    assert [stage.is_last for stage in plan(2, ["sft", "dpo"])] == [False, False, False, True]


def test_another_seed_cuts_other_parts():
    assert parts(100, 4, 0) != parts(100, 4, 1)


def test_parts_are_mixed_from_the_whole_data_set():
    assert all(part[0] < 250 and part[-1] >= 750 for part in parts(1000, 4, 42))


def test_fewer_rows_than_rounds_is_an_error():
    with pytest.raises(ValueError, match=r"`num_rounds` is 4 but the data set has 3 rows"):
        part_indices(3, 4, 0, 0)


@given(st.integers(1, 6), st.lists(st.sampled_from(["sft", "dpo", "kto", "ppo"]), min_size=1, unique=True))
def test_plan_runs_the_objectives_in_order_in_every_round(num_rounds, objectives):
    stages = plan(num_rounds, objectives)
    found = [(stage.index, stage.part, stage.objective) for stage in stages]
    assert found == oracle.stages(num_rounds, objectives)
    assert [stage.round for stage in stages] == [part + 1 for _, part, _ in found]
    assert {stage.num_rounds for stage in stages} == {num_rounds}


def test_folders_of_stages_are_unique_and_sort_in_the_order_of_the_run():
    folders = [stage.folder for stage in plan(20, ["sft", "dpo"])]
    assert folders[:3] == ["stage-000-sft", "stage-001-dpo", "stage-002-sft"]
    assert folders == sorted(set(folders))


def test_a_stage_says_where_it_stands_in_words():
    assert str(plan(4, ["sft", "dpo"])[3]) == "stage 3 (round 2 of 4, dpo)"


@st.composite
def shares(draw):
    """(rows, shares, seed), of shares whose sum is at most 1."""
    weights = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any))
    of = sum(weights) + draw(st.integers(0, 3))
    return draw(st.integers(1, 200)), [weight / of for weight in weights], draw(st.integers(0, 2**32))


@given(shares())
def test_parts_of_shares_are_disjoint_and_as_large_as_their_shares(cut):
    num_rows, given_shares, seed = cut
    dealt = [
        part_indices(num_rows, len(given_shares), index, seed, given_shares) for index in range(len(given_shares))
    ]
    rows = [row for part in dealt for row in part]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(num_rows))
    for part, share in zip(dealt, given_shares, strict=True):
        assert abs(len(part) - share * num_rows) <= 1
        assert part == sorted(part)


def test_an_objective_without_a_share_has_no_stage_in_the_round():
    stages = plan(2, ["sft", "dpo"], shares={"sft": (1, 0), "dpo": (0.5, 0.5)})
    assert [(stage.round, stage.objective, stage.is_last) for stage in stages] == [
        (1, "sft", False),
        (1, "dpo", False),
        (2, "dpo", True),
    ]
