"""Which prompts a rollout takes and which rows a micro-batch."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbat.ppo.rollouts.schedule import Position, RolloutSchedule


@st.composite
def schedules(draw):
    """All processes' schedules of one run."""
    micro_size, micro_steps, updates = (draw(st.integers(1, 3)) for _ in range(3))
    size = micro_size * micro_steps * updates
    processes = draw(st.integers(1, 3))
    rollouts, left_over = draw(st.integers(1, 4)), draw(st.integers(0, size * processes - 1))
    options = {
        "prompts": rollouts * size * processes + left_over,
        "size": size,
        "passes": draw(st.integers(1, 3)),
        "micro_size": micro_size,
        "micro_steps": micro_steps,
        "processes": processes,
        "seed": draw(st.integers(0, 2**32)),
    }
    return [RolloutSchedule(process=each, **options) for each in range(processes)]


def schedule(**options):
    defaults = {
        "prompts": 20, "size": 8, "passes": 2, "micro_size": 2, "micro_steps": 2,
        "processes": 1, "process": 0, "seed": 0,
    }  # fmt: skip
    return RolloutSchedule(**(defaults | options))


# --- counts and positions --------------------------------------------------------------------------------------------


def test_counts_of_an_example_worked_by_hand():
    plan = schedule(prompts=20, processes=1)
    assert plan.updates_per_pass == 2  # 8 rows in updates of 2 * 2
    assert plan.updates_per_rollout == 4  # in two passes
    assert plan.rollouts_per_epoch == 2  # of 8 out of 20 prompts
    assert plan.micro_steps_per_epoch == 16


def test_positions_of_an_example_worked_by_hand():
    plan = schedule()
    found = [(each.rollout, each.update, each.micro_batch) for each in map(plan.position, range(10))]
    assert found == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (0, 3, 0), (0, 3, 1), (1, 0, 0), (1, 0, 1),
    ]  # fmt: skip


@given(schedules(), st.integers(1, 3))
def test_micro_steps_go_through_all_parts_of_all_updates_of_all_rollouts_in_order(plans, epochs):
    plan = plans[0]
    found = [plan.position(each) for each in range(epochs * plan.micro_steps_per_epoch)]
    expected = itertools.product(
        range(epochs * plan.rollouts_per_epoch), range(plan.updates_per_rollout), range(plan.micro_steps)
    )
    assert [(each.rollout, each.update, each.micro_batch) for each in found] == list(expected)


def test_only_its_first_micro_step_begins_a_rollout():
    plan = schedule()
    begins = [each for each in range(24) if plan.position(each).begins_rollout]
    assert begins == [0, 8, 16]


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompts_of(plans, rollouts):
    return [index for rollout in rollouts for plan in plans for index in plan.prompt_indices(rollout)]


@given(schedules(), st.integers(0, 2))
def test_an_epoch_uses_each_prompt_at_most_once_over_all_processes(plans, epoch):
    per_epoch = plans[0].rollouts_per_epoch
    used = prompts_of(plans, range(epoch * per_epoch, (epoch + 1) * per_epoch))
    assert len(set(used)) == len(used) == per_epoch * plans[0].size * len(plans)
    assert set(used) <= set(range(plans[0].prompts))
    assert plans[0].prompts - len(used) < plans[0].size * len(plans)  # no rollout more would have found prompts


def test_epochs_differ_in_order_and_in_what_they_leave_out():
    plan = schedule(prompts=39, size=4)
    first, second = (prompts_of([plan], range(9 * each, 9 * each + 9)) for each in range(2))
    assert first != second
    assert first != sorted(first)
    left_out = {frozenset(range(39)) - set(prompts_of([plan], range(9 * each, 9 * each + 9))) for each in range(6)}
    assert len(left_out) > 1


@pytest.mark.parametrize("seed", [0, 7])
def test_another_seed_gives_another_order(seed):
    assert schedule(seed=seed).prompt_indices(0) != schedule(seed=seed + 1).prompt_indices(0)


# --- rows ------------------------------------------------------------------------------------------------------------


@given(schedules(), st.integers(0, 5))
def test_every_pass_covers_each_row_of_a_rollout_exactly_once(plans, rollout):
    plan = plans[0]
    for number in range(plan.passes):
        updates = range(number * plan.updates_per_pass, (number + 1) * plan.updates_per_pass)
        rows = [plan.row_indices(Position(rollout=rollout, update=each, micro_batch=0)) for each in updates]
        assert all(each.shape == (plan.micro_steps, plan.micro_size) for each in rows)
        assert sorted(torch.stack(rows).flatten().tolist()) == list(range(plan.size))


def test_the_parts_of_an_update_are_rows_of_one_table():
    plan = schedule()
    tables = [plan.row_indices(Position(rollout=3, update=1, micro_batch=each)) for each in range(2)]
    assert torch.equal(*tables)


def test_passes_and_rollouts_have_orders_of_their_own():
    plan = schedule(size=64, prompts=64, micro_size=8, micro_steps=8, passes=3)
    orders = [plan.row_indices(Position(rollout=r, update=u, micro_batch=0)) for r in range(3) for u in range(3)]
    assert len({tuple(each.flatten().tolist()) for each in orders}) == 9


# --- seeds -----------------------------------------------------------------------------------------------------------


@given(schedules())
@settings(max_examples=30)
def test_no_two_rollouts_or_processes_sample_with_the_same_seed(plans):
    seeds = [plan.sampling_seed(rollout) for plan in plans for rollout in range(50)]
    assert len(set(seeds)) == len(seeds)
    for each in seeds:
        torch.Generator().manual_seed(each)


def test_runs_with_neighbouring_seeds_do_not_share_sampling_seeds():
    seeds = [schedule(seed=each).sampling_seed(rollout) for each in range(5) for rollout in range(200)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**62, 2**64])
def test_any_seed_will_do(seed):
    plan = schedule(seed=seed)
    torch.Generator().manual_seed(plan.sampling_seed(10**6))
    assert len(plan.prompt_indices(10**6)) == 8
    assert plan.row_indices(plan.position(10**9)).shape == (2, 2)


# --- a pure function -------------------------------------------------------------------------------------------------


def everything(plan):
    positions = [plan.position(each) for each in range(plan.micro_steps_per_epoch + 1)]
    return (
        [plan.prompt_indices(each.rollout) for each in positions],
        [plan.row_indices(each).tolist() for each in positions],
        [plan.sampling_seed(each.rollout) for each in positions],
    )


@given(schedules())
@settings(max_examples=30)
def test_what_is_chosen_depends_on_nothing_but_seed_and_position(plans):
    first = everything(plans[0])
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    assert everything(dataclasses.replace(plans[0])) == first
    assert torch.equal(torch.get_rng_state(), state)


@given(schedules())
@settings(max_examples=30)
def test_rows_are_the_same_on_all_processes(plans):
    """Each has a rollout of its own, but takes rows of the same numbers."""
    for position in (plans[0].position(each) for each in range(plans[0].micro_steps_per_epoch)):
        tables = {tuple(plan.row_indices(position).flatten().tolist()) for plan in plans}
        assert len(tables) == 1
