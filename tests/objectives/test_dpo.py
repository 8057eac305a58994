"""Sequences out of rows that TRL's own DPOTrainer prepared."""

import cases
import pytest
import runs
import trl

from hbat.objectives.dpo import DPO


@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "conversations"])
def test_the_chosen_answer_is_the_target_and_the_rejected_one_is_absent(conversational, tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), report_to="none", **runs.section())
    trainer = trl.DPOTrainer(
        cases.tiny_llama(),
        cases.tiny_llama(),
        args=args,
        train_dataset=cases.preference_rows(3, conversational=conversational),
        processing_class=cases.tiny_tokenizer(),
    )
    tokenizer = cases.tiny_tokenizer()
    for row, original in zip(trainer.train_dataset, cases.preference_rows(3), strict=True):
        (example,) = DPO().fisher_sequences(row)
        target = [label for label in example.labels if label != -100]
        answer = tokenizer.decode(target, skip_special_tokens=True)
        assert answer.strip() == original["chosen"].strip()
        assert target == list(example.input_ids)[-len(target) :]
        assert tokenizer.decode(example.input_ids, skip_special_tokens=True).count(original["prompt"]) == 1
        assert target[-1] == tokenizer.eos_token_id
