"""The demo's base model is made in memory, the same one for the same seed."""

import pytest
import torch

from hbat.cli.demo.base_model import LONGEST_TEXT, build_model, build_tokenizer, prepare_base
from hbat.cli.demo.task import LONGEST_LIST, WORDS, instruction_rows


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_every_word_is_one_token(tokenizer):
    ids = tokenizer(" ".join(WORDS))["input_ids"]
    assert len(ids) == len(WORDS)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == " ".join(WORDS)


def test_the_tokens_of_a_prompt_are_the_first_of_its_text(tokenizer):
    for row in instruction_rows(0, 50):
        prompt = tokenizer(row["prompt"])["input_ids"]
        text = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert text[: len(prompt)] == prompt
        assert text[-1] == tokenizer.eos_token_id
        assert len(text) == len((row["prompt"] + row["completion"]).split()) + 1


def test_padding_and_the_end_of_text_are_different_tokens(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_the_longest_text_fits_the_model():
    task, mark, opening, fillers, closing, end = 1, 1, 1, 2, 1, 1
    assert task + LONGEST_LIST + mark + opening + LONGEST_LIST + fillers + closing + end <= LONGEST_TEXT


def test_the_model_is_deterministic_in_training_mode():
    model = build_model(0, width=16, layers=1, heads=2).train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_base_model_depends_on_the_seed_alone():
    def prepared(seed):
        model = build_model(seed, width=16, layers=1, heads=2)
        return weights(prepare_base(seed, model=model, steps=3, batch_size=8))

    first = prepared(0)
    torch.rand(3)
    assert torch.equal(first, prepared(0))
    assert not torch.equal(first, prepared(1))


def test_preparing_the_base_model_leaves_the_global_source_of_chance_alone():
    before = torch.get_rng_state()
    prepare_base(0, model=None, steps=1, batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_preparing_the_base_model_lowers_the_loss_and_reports_every_step():
    seen = []
    model = prepare_base(0, steps=40, batch_size=32, learning_rate=4e-3, progress=lambda *args: seen.append(args))
    assert [step for step, _ in seen] == list(range(1, 41))
    assert seen[-1][1] < seen[0][1] - 0.5
    assert not model.training
