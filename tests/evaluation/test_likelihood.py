"""Likelihoods against a slow float64 version; pairs as TRL tokenizes them, texts as the loss of transformers."""

import cases
import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hbat.evaluation.likelihood import Sequences, log_likelihoods, of_pairs, of_texts, pair_sequences

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


def test_the_likelihood_of_an_adapter_that_learns_a_prompt_counts_its_prompt():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(cases.tiny_llama(), config).eval()
    found = log_likelihoods(model, cases.tiny_tokenizer(), sequences(), 2)
    expected = []
    for each in sequences():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*each.prompt, *each.target]])).logits[0, 3:].log_softmax(-1)
        start = len(each.prompt) - 1
        expected.append(sum(float(logits[start + place, token]) for place, token in enumerate(each.target)))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(
        log_likelihoods(model.get_base_model(), cases.tiny_tokenizer(), sequences(), 2), rel=1e-3
    )


def merging_tokenizer():
    """Tokens of two letters, of which some reach across the end of a prompt."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"abcd ", "ab", "bc", "ca"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c"), ("c", "a")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")  # noqa: S106 - no password


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("da", "d", "c"),
        ("da", "bd", "cd"),
        ("a", "b", "c"),
        ("a", "d", "ba"),
        ("dab", "ca", "dd"),
        ("cab", "ab", "cc"),
    ],
)
def test_tokens_that_merge_across_the_end_of_a_prompt_are_those_of_trl(tmp_path, prompt, chosen, rejected):
    tokenizer = merging_tokenizer()
    rows = Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    args = trl.DPOConfig(output_dir=str(tmp_path), max_length=None, **cases.CHEAP_ARGS)
    own = trl.DPOTrainer(cases.tiny_llama(), cases.tiny_llama(), args, train_dataset=rows, processing_class=tokenizer)
    row = own.train_dataset[0]
    for side, found in zip(("chosen", "rejected"), pair_sequences(rows, tokenizer, 64), strict=True):
        whole = [*row["prompt_ids"], *row[f"{side}_ids"]]
        assert [*found.prompt, *found.target] == whole
        assert found.target == (
            row[f"{side}_ids"] if row["prompt_ids"] else whole[1:]
        )  # the first token has no context


@pytest.mark.parametrize("conversational", [False, True])
def test_pairs_are_tokenized_as_by_trl(tmp_path, conversational):
    rows, tokenizer = cases.preference_rows(4, conversational=conversational), cases.tiny_tokenizer()
    args = trl.DPOConfig(output_dir=str(tmp_path), max_length=None, **cases.CHEAP_ARGS)
    trainer = trl.DPOTrainer(
        cases.tiny_llama(), cases.tiny_llama(), args, train_dataset=rows, processing_class=tokenizer
    )
    for row, own in zip(rows, trainer.train_dataset, strict=True):
        chosen, rejected = pair_sequences([row], tokenizer, 512)
        assert [chosen.prompt, chosen.target, rejected.target] == [
            own["prompt_ids"],
            own["chosen_ids"],
            own["rejected_ids"],
        ]


def test_accuracy_and_margin_are_those_of_the_pairs():
    model, tokenizer = cases.tiny_llama().eval(), cases.tiny_tokenizer()
    rows = list(cases.preference_rows(6))
    scores = of_pairs(model, tokenizer, rows, batch_size=4, max_length=64, seed=0)
    pairs = [pair_sequences([row], tokenizer, 64) for row in rows]
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
    whole = pair_sequences([row], tokenizer, 512)
    size = len(whole[0].target) + 2
    short = pair_sequences([row], tokenizer, size)
    assert short[0] == Sequences(whole[0].prompt[-2:], whole[0].target)
    assert len(short[1].prompt) + len(short[1].target) <= size
    assert pair_sequences([row], tokenizer, 2)[0] == Sequences(whole[0].prompt[-1:], whole[0].target[:1])


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


def test_texts_and_pairs_are_no_longer_than_the_context():
    model, tokenizer = cases.tiny_llama(), cases.tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    context, common = model.config.max_position_embeddings, {"batch_size": 2, "max_length": 10_000, "seed": 0}
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    of_texts(model, tokenizer, ["x" * 500], **common)
    of_pairs(model, tokenizer, [{"prompt": "x" * 500, "chosen": "y" * 5, "rejected": "z" * 400}], **common)
    assert max(seen) == context
