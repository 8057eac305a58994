"""Rollouts: rows, files, and what each token is worth, as a whole against the oracle."""

import dataclasses
import json
import struct

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbat.ppo.config import PPOConfig
from hbat.ppo.rollouts.rollout import Rollout, Sequences, assess
from hbat.ppo.trainer import update_loss

NAN = float("nan")
PROMPT_LENGTHS = [3, 1, 2, 5]
LENGTHS = [2, 6, 1, 4]
PAD = 0


def sequences(prompt_lengths=PROMPT_LENGTHS, lengths=LENGTHS, *, extra=0):
    """Rows of tokens 1, 2, 3, ... with `extra` columns of padding on either side."""
    before, after = max(prompt_lengths) + extra, max(lengths) + extra
    prompt_mask = torch.arange(before) >= before - torch.tensor(prompt_lengths)[:, None]
    completion_mask = torch.arange(after) < torch.tensor(lengths)[:, None]
    tokens = torch.arange(1, len(lengths) * (before + after) + 1).view(len(lengths), -1)
    return Sequences(
        prompt_ids=torch.where(prompt_mask, tokens[:, :before], PAD),
        prompt_mask=prompt_mask.long(),
        completion_ids=torch.where(completion_mask, tokens[:, before:], PAD),
        completion_mask=completion_mask,
    )


def rollout(seed=0, **options):
    whole = sequences(**options)
    generator = torch.Generator().manual_seed(seed)
    numbers = {
        name: torch.where(whole.completion_mask, torch.randn(whole.completion_mask.shape, generator=generator), 0.0)
        for name in ("log_probs", "values", "advantages", "returns")
    }
    return Rollout(**{each.name: getattr(whole, each.name) for each in dataclasses.fields(Sequences)}, **numbers)


def contents(whole):
    """What each row holds without any padding."""
    return [
        (
            ids[prompt.bool()].tolist(),
            *(getattr(whole, each.name)[row][inside].tolist() for each in dataclasses.fields(whole)[2:]),
        )
        for row, (ids, prompt, inside) in enumerate(
            zip(whole.prompt_ids, whole.prompt_mask, whole.completion_mask, strict=True)
        )
    ]


def same(first, second):
    return all(
        torch.equal(getattr(first, each.name), getattr(second, each.name)) for each in dataclasses.fields(first)
    )


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [sequences, rollout])
@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=5), extra=st.integers(0, 2))
@settings(max_examples=40)
def test_selected_rows_hold_what_they_held_and_no_more_padding_than_they_need(build, rows, extra):
    whole = build(extra=extra)
    part = whole.select(torch.tensor(rows))
    assert type(part) is type(whole)
    assert contents(part) == [contents(whole)[each] for each in rows]
    assert part.prompt_ids.shape == part.prompt_mask.shape == (len(rows), max(PROMPT_LENGTHS[each] for each in rows))
    length = max(LENGTHS[each] for each in rows)
    for each in dataclasses.fields(part)[2:]:
        assert getattr(part, each.name).shape == (len(rows), length)


def test_selecting_all_rows_changes_nothing():
    whole = rollout()
    assert same(whole.select(torch.arange(4)), whole)


def test_selecting_leaves_the_whole_as_it_was():
    whole = rollout()
    whole.select(torch.tensor([1])).advantages.zero_()
    assert same(whole, rollout())


def test_prompt_and_completion_lie_side_by_side_with_padding_outside():
    whole = sequences([1, 2], [2, 1])
    assert whole.input_ids.tolist() == [[0, 2, 3, 4], [5, 6, 7, 0]]
    assert whole.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert whole.attention_mask.dtype == torch.int64


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_rollout_that_is_written_is_read_back_bit_by_bit(tmp_path):
    whole = rollout()
    whole.save(tmp_path / "rollout.safetensors")
    found = Rollout.load(tmp_path / "rollout.safetensors", "cpu")
    assert same(found, whole)
    for each in dataclasses.fields(whole):
        assert getattr(found, each.name).dtype == getattr(whole, each.name).dtype


def test_some_rows_of_a_rollout_can_be_written_too(tmp_path):
    part = rollout().select(torch.tensor([2, 0]))
    part.save(tmp_path / "rollout.safetensors")
    assert same(Rollout.load(tmp_path / "rollout.safetensors", torch.device("cpu")), part)


def test_the_file_is_safetensors_and_nothing_is_left_beside_it(tmp_path):
    rollout().save(tmp_path / "rollout.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["rollout.safetensors"]
    raw = (tmp_path / "rollout.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header.keys() - {"__metadata__"} == {each.name for each in dataclasses.fields(Rollout)}


# --- what tokens are worth -------------------------------------------------------------------------------------------


def configuration(folder, **options):
    return PPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **options)


def statistics(whole, seed=0, *, outside=NAN):
    """Log-probabilities and values of the completions' tokens; `outside` stands in the padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = whole.completion_mask.shape
    numbers = {
        "log_probs": -3.0 * torch.rand(shape, generator=generator),
        "reference": -3.0 * torch.rand(shape, generator=generator),
        "values": torch.randn(shape, generator=generator),
    }
    return {name: torch.where(whole.completion_mask, each, outside) for name, each in numbers.items()}


def expected(scores, numbers, lengths, config, kl_coef):
    """Advantages, returns and KL terms of each completion."""
    rows = {name: oracle.ragged(each, lengths) for name, each in numbers.items()}
    kl = [
        [oracle.kl_term(*each, config.kl_estimator) for each in zip(*pair, strict=True)]
        for pair in zip(rows["log_probs"], rows["reference"], strict=True)
    ]
    rewards = oracle.token_rewards(scores, kl, kl_coef)
    if config.whiten_rewards:
        rewards = oracle.whiten(rewards, shift_mean=False)
    pairs = list(zip(rewards, rows["values"], strict=True))
    advantages = [oracle.advantages(*each, config.gamma, config.lam) for each in pairs]
    returns = [[a + v for a, v in zip(*each, strict=True)] for each in zip(advantages, rows["values"], strict=True)]
    if config.whiten_advantages:
        advantages = oracle.whiten(advantages, shift_mean=True)
    return advantages, returns, kl


def assert_ragged(found, rows):
    """The rows, and zeros in the padding."""
    for row, wanted in zip(found.tolist(), rows, strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert row[len(wanted) :] == [0.0] * (len(row) - len(wanted))


OPTIONS = [
    {},
    {"kl_estimator": "k3"},
    {"whiten_rewards": True},
    {"whiten_advantages": False},
    {"gamma": 0.9, "lam": 0.5, "whiten_advantages": False},
    {"gamma": 1.0, "lam": 1.0, "kl_estimator": "k3", "whiten_rewards": True, "whiten_advantages": False},
    {"gamma": 0.5, "lam": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_what_tokens_are_worth_equals_the_oracle(tmp_path, options, kl_coef):
    config, whole, scores = configuration(tmp_path, **options), sequences(), [1.5, -2.0, 0.25, 3.0]
    numbers = statistics(whole)
    found, kl = assess(whole, numbers, torch.tensor(scores), config, kl_coef, lambda value: value)
    advantages, returns, terms = expected(scores, numbers, LENGTHS, config, kl_coef)
    assert_ragged(found.advantages, advantages)
    assert_ragged(found.returns, returns)
    assert_ragged(kl, terms)
    assert_ragged(found.values, oracle.ragged(numbers["values"], LENGTHS))
    assert_ragged(found.log_probs, oracle.ragged(numbers["log_probs"], LENGTHS))
    assert same(found.select(torch.arange(4)), found)
    for each in dataclasses.fields(Sequences):
        assert getattr(found, each.name) is getattr(whole, each.name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_changes_nothing(tmp_path, options):
    config, scores = configuration(tmp_path, **options), torch.tensor([1.5, -2.0, 0.25, 3.0])
    narrow, wide = sequences(), sequences(extra=3)
    numbers = statistics(narrow)
    padded = {name: torch.nn.functional.pad(each, (0, 3), value=NAN) for name, each in numbers.items()}
    first, _ = assess(narrow, numbers, scores, config, 0.1, lambda value: value)
    second, _ = assess(wide, padded, scores, config, 0.1, lambda value: value)
    for name in ("advantages", "returns", "values"):
        torch.testing.assert_close(getattr(second, name)[:, :-3], getattr(first, name))
        assert getattr(second, name)[:, -3:].abs().max() == 0


@pytest.mark.parametrize("outside", [-torch.inf, -200.0, 0.0])
def test_what_the_model_thinks_of_padding_does_not_reach_the_gradient(tmp_path, outside):
    """A model can rule its padding token out, so that the logarithm of its probability is -inf."""
    config, whole = configuration(tmp_path), sequences()
    numbers, scores = statistics(whole, outside=outside), torch.tensor([1.5, -2.0, 0.25, 3.0])
    found, _ = assess(whole, numbers, scores, config, 0.1, lambda value: value)
    now = torch.where(whole.completion_mask, numbers["log_probs"] + 0.1, outside).requires_grad_()
    loss, shares = update_loss((now, torch.zeros_like(now), found.values), found, whole.completion_mask.sum(), config)
    loss.backward()
    assert torch.equal(now.grad != 0, whole.completion_mask)
    assert now.grad.isfinite().all()
    assert all(each.isfinite() for each in (loss, *shares.values()))


@pytest.mark.parametrize("options", [{}, {"whiten_rewards": True}], ids=str)
def test_two_processes_whiten_as_one_with_all_rows(tmp_path, options):
    """Sums are taken in rounds: each further one depends on those before, so they are found one after the other."""
    config, whole = configuration(tmp_path, **options), sequences()
    numbers, scores = statistics(whole), torch.tensor([1.5, -2.0, 0.25, 3.0])
    expected_rollout, _ = assess(whole, numbers, scores, config, 0.1, lambda value: value)
    halves = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    inputs = [
        (
            Sequences(**{each.name: getattr(whole, each.name)[rows] for each in dataclasses.fields(Sequences)}),
            {name: each[rows] for name, each in numbers.items()},
            scores[rows],
        )
        for rows in halves
    ]
    sums = [[], []]
    while True:
        asked, found = [], []
        for process, each in enumerate(inputs):
            own, known = [], iter(sums[1 - process])

            def total(value, own=own, known=known):
                own.append(value.clone())
                return value + next(known, torch.zeros(()))

            found.append(assess(*each, config, 0.1, total)[0])
            asked.append(own)
        if all(list(map(float, new)) == list(map(float, old)) for new, old in zip(asked, sums, strict=True)):
            break
        sums = asked
    for name in ("advantages", "returns"):
        torch.testing.assert_close(torch.cat([getattr(each, name) for each in found]), getattr(expected_rollout, name))
    assert len(sums[0]) == 3 * (1 + len(options))
