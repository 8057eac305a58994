"""Likelihoods against a slow float64 version; pairs as TRL tokenizes them, texts as the loss of transformers."""

import cases
import pytest
import torch
import trl

from hbat.evaluation.likelihood import Sequences, _answers, log_likelihoods, of_pairs, of_texts

TEXTS = ["2 plus 2 is 4", "3", "the answer is 7 plus 9 is 16"]


def slow(model, sequence):
    ids = torch.tensor([[*sequence.prompt, *sequence.target]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()[0]
    terms = []
    for place in range(len(sequence.prompt), ids.shape[1]):
        scores = logits[place - 1]
        terms.append(scores[ids[0, place]] - torch.log(torch.exp(scores - scores.max()).sum()) - scores.max())
    return float(sum(terms))


def sequences():
    return [
        Sequences([3, 4, 5], [6, 7]),
        Sequences([8], [9, 10, 11, 12]),
        Sequences([5] * 9, [3]),
        Sequences([4, 4], [4]),
    ]


@pytest.mark.parametrize("build", [cases.tiny_llama, cases.lora_llama], ids=["full", "lora"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_likelihoods_are_those_of_every_sequence_alone(build, batch_size):
    model = build(0).train()
    found = log_likelihoods(model, cases.tiny_tokenizer(), sequences(), batch_size)
    assert model.training
    model.eval()
    assert found == pytest.approx([slow(model, each) for each in sequences()], rel=1e-5)


@pytest.mark.parametrize("conversational", [False, True])
def test_pairs_are_tokenized_as_by_trl(tmp_path, conversational):
    rows, tokenizer = cases.preference_rows(4, conversational=conversational), cases.tiny_tokenizer()
    args = trl.DPOConfig(output_dir=str(tmp_path), max_length=None, **cases.CHEAP_ARGS)
    trainer = trl.DPOTrainer(
        cases.tiny_llama(), cases.tiny_llama(), args, train_dataset=rows, processing_class=tokenizer
    )
    for row, own in zip(rows, trainer.train_dataset, strict=True):
        chosen, rejected = _answers(row, tokenizer, 512)
        assert [chosen.prompt, chosen.target, rejected.target] == [
            own["prompt_ids"],
            own["chosen_ids"],
            own["rejected_ids"],
        ]


def test_accuracy_and_margin_are_those_of_the_pairs():
    model, tokenizer = cases.tiny_llama().eval(), cases.tiny_tokenizer()
    rows = list(cases.preference_rows(6))
    scores = of_pairs(model, tokenizer, rows, batch_size=4, max_length=64, seed=0)
    pairs = [_answers(row, tokenizer, 64) for row in rows]
    values = [[slow(model, side) for side in pair] for pair in pairs]
    assert scores["accuracy"] == sum(chosen > rejected for chosen, rejected in values) / 6
    assert scores["margin"] == pytest.approx(sum(chosen - rejected for chosen, rejected in values) / 6, rel=1e-4)
    means = [
        [value / len(side.target) for value, side in zip(*both, strict=True)]
        for both in zip(values, pairs, strict=True)
    ]
    assert scores["margin_per_token"] == pytest.approx(
        sum(one - other for one, other in means) / 6, rel=1e-3, abs=1e-6
    )
    assert scores["accuracy_per_token"] == sum(one > other for one, other in means) / 6
    assert scores["accuracy_low"] <= scores["accuracy"] <= scores["accuracy_high"]


def test_a_pair_that_is_too_long_loses_the_beginning_of_its_prompt():
    row, tokenizer = {"prompt": "1 2 3 4 5 6", "chosen": " 7 8", "rejected": " 9"}, cases.tiny_tokenizer()
    whole = _answers(row, tokenizer, 512)
    size = len(whole[0].target) + 2
    short = _answers(row, tokenizer, size)
    assert short[0] == Sequences(whole[0].prompt[-2:], whole[0].target)
    assert len(short[1].prompt) + len(short[1].target) <= size
    assert _answers(row, tokenizer, 2)[0] == Sequences(whole[0].prompt[-1:], whole[0].target[:1])


def test_the_loss_of_texts_is_per_token_of_all_texts():
    model, tokenizer = cases.tiny_llama().eval(), cases.tiny_tokenizer()
    scores = of_texts(model, tokenizer, TEXTS, batch_size=2, max_length=64, seed=0)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        if tokenizer.bos_token_id is not None and ids[0] != tokenizer.bos_token_id:
            ids = [tokenizer.bos_token_id, *ids]
        if len(ids) > 1:
            inputs = torch.tensor([ids])
            total += model(input_ids=inputs, labels=inputs).loss.item() * (len(ids) - 1)
            count += len(ids) - 1
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)
    assert scores["loss_low"] <= scores["loss"] <= scores["loss_high"]


def test_texts_without_two_tokens_are_refused():
    with pytest.raises(ValueError, match="no text of two tokens"):
        of_texts(cases.tiny_llama(), cases.tiny_tokenizer(), [""], batch_size=2, max_length=64, seed=0)
