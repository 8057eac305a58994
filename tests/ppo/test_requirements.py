"""What does not fit is refused when the trainer is built, with what to do."""

import cases
import ppo_cases
import pytest
import runs
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from ppo_cases import arguments, build
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hbat.data.load import DatasetError
from hbat.ppo.config import PPOConfig
from hbat.ppo.trainer import PPOTrainer

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def prompts(texts):
    return Dataset.from_dict({"prompt": texts, "target": list(range(len(texts)))})


GOOD = ["one plus two?", "two plus two?", "three?", "four?"]


def test_a_prompt_that_leaves_no_room_is_refused_with_its_row(tmp_path):
    rows = prompts([*GOOD, "x" * 125, "y" * 126])
    with pytest.raises(
        ValueError,
        match=r"train_dataset, row 4: the prompt has 125 tokens.*room for 122 \(2 such rows, the longest has 126\)",
    ):
        build(cases.tiny_llama(0), tmp_path, rows=rows)


def test_a_prompt_that_just_fits_is_trained_on(tmp_path):
    build(cases.tiny_llama(0), tmp_path, rows=prompts(["x" * 122, *GOOD])).train()


def test_completions_longer_than_the_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_completion_length` is 128, but the model's context is only 128"):
        build(cases.tiny_llama(0), tmp_path, max_completion_length=128)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (prompts(["a", "", "b", "c"]), r"row 1, field `prompt`: the text is empty\. .*Fix the data\.$"),
        (prompts(["a", None, "b", "c"]), "row 1, field `prompt`: the value is missing"),
        (
            prompts([[{"role": "assistant", "content": "a"}]] * 4),
            "row 0, .*: the last turn must be",
        ),
        (Dataset.from_dict({"question": ["a"] * 8}), "has no column `prompt`. Its columns: `question`"),
        ([{"prompt": "a"}] * 4, r"is a list; .* Create one with `datasets\.Dataset\.from_list"),
        (prompts(GOOD).to_iterable_dataset(), "is an IterableDataset, which has no length"),
        (prompts(GOOD).to_pandas(), "is a DataFrame; it must be a `datasets.Dataset`"),
    ],
)
def test_rows_that_are_no_prompts_are_refused_for_training_and_evaluation(rows, message, tmp_path):
    with pytest.raises(DatasetError, match=f"^train_dataset.*{message}"):
        build(cases.tiny_llama(0), tmp_path, rows=rows)
    with pytest.raises(DatasetError, match=f"^eval_dataset.*{message}"):
        build(cases.tiny_llama(0), tmp_path, rows=prompts(GOOD), eval_dataset=rows)


def test_fewer_rows_than_a_rollout_takes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has 3 rows, but a rollout takes 4 prompts"):
        build(cases.tiny_llama(0), tmp_path, rows=prompts(GOOD[:3]))


def without(token):
    tokenizer = cases.tiny_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: value for name, value in {"pad_token": "<pad>", "eos_token": "</s>"}.items() if name != token},
    )


def built_with(tokenizer, folder, model=None, rows=None, **options):
    return PPOTrainer(
        model or cases.tiny_llama(0),
        arguments(folder, **options),
        rows or ppo_cases.prompts(),
        processing_class=tokenizer,
        reward_funcs=ppo_cases.letters,
    )


def test_a_tokenizer_without_end_token_is_refused_unless_something_else_ends_completions(tmp_path):
    with pytest.raises(ValueError, match="no EOS token, so no completion would ever end"):
        built_with(without("eos_token"), tmp_path)
    trainer = built_with(without("eos_token"), tmp_path, generation_kwargs={"eos_token_id": 1}, max_steps=1)
    trainer.train()


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    trainer = built_with(without("pad_token"), tmp_path, max_steps=1)
    trainer.train()
    assert trainer.processing_class.pad_token_id == 1


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="The tokenizer has 261 tokens, but the policy only 100 embeddings"):
        built_with(cases.tiny_tokenizer(), tmp_path, model=cases.tiny_llama(0, vocabulary=100))


def test_conversations_without_chat_template_are_refused(tmp_path):
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        built_with(tokenizer, tmp_path, rows=ppo_cases.prompts(conversational=True))


def test_conversations_for_a_reward_model_without_chat_template_are_refused(tmp_path):
    from scorers import tiny_scorer

    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = None
    scorer = tiny_scorer(vocabulary=cases.VOCABULARY_SIZE)
    with pytest.raises(ValueError, match="chat template"):
        PPOTrainer(
            cases.tiny_llama(0),
            arguments(tmp_path),
            ppo_cases.prompts(conversational=True),
            processing_class=cases.tiny_tokenizer(),
            reward_funcs=scorer,
            reward_processing_classes=tokenizer,
        )


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    from scorers import tiny_scorer

    with pytest.raises(ValueError, match="PPO needs a causal language model"):
        build(tiny_scorer(vocabulary=cases.VOCABULARY_SIZE), tmp_path)
    with pytest.raises(TypeError, match="`model` is a int"):
        build(3, tmp_path)


def test_a_second_adapter_is_refused_and_a_first_one_is_trained(tmp_path):
    with pytest.raises(ValueError, match="has an adapter already"):
        build(cases.lora_llama(0), tmp_path, peft_config=LORA)
    trainer = build(cases.tiny_llama(0), tmp_path, peft_config=LORA, max_steps=1)
    trainer.train()
    assert set(trainer.policy.peft_config) == {"default", "ref"}


@pytest.mark.parametrize(
    ("make", "advice"),
    [(cases.tiny_llama, "Unfreeze what is to be trained"), (cases.lora_llama, "Load the adapter with `is_trainable")],
    ids=["full", "lora"],
)
def test_a_policy_of_which_nothing_is_trained_is_refused(make, advice, tmp_path):
    with pytest.raises(ValueError, match=f"The model has no trainable parameter. {advice}"):
        build(make(0).requires_grad_(False), tmp_path)


@pytest.mark.filterwarnings("ignore:The PEFT config's .base_model_name_or_path. was renamed:UserWarning")
def test_the_folder_of_an_adapter_is_trained_on_with_its_tokenizer_and_critic(tmp_path):
    cases.tiny_llama(0).save_pretrained(tmp_path / "base")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), cases.tiny_tokenizer()
    tokenizer.chat_template = "mine"
    first = built_with(tokenizer, tmp_path / "adapter", get_peft_model(base, LORA), max_steps=1)
    first.train()
    first.save_model()
    second = built_with(None, tmp_path / "second", tmp_path / "adapter", max_steps=1)
    assert second.processing_class.chat_template == "mine"
    assert runs.same(cases.weights(second.model), cases.weights(first.model))
    second.train()
    assert not runs.same(cases.weights(second.policy), cases.weights(first.policy))


def test_arguments_of_another_trainer_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="`args` is a TrainingArguments; pass a `PPOConfig`"):
        PPOTrainer(cases.tiny_llama(0), TrainingArguments(str(tmp_path)), ppo_cases.prompts())


REFUSED = {
    "rollouts that do not divide": ({"rollout_batch_size": 7}, r"`rollout_batch_size` is 7, which is not a multiple"),
    "no passes": ({"num_ppo_epochs": 0}, "`num_ppo_epochs` is 0"),
    "no rollout": ({"rollout_batch_size": 0}, "`rollout_batch_size` is 0"),
    "no completion": ({"max_completion_length": 0}, "`max_completion_length` is 0"),
    "temperature": ({"temperature": 0.0}, "`temperature` is 0.0; it must be above 0"),
    "top_p": ({"top_p": 1.5}, "`top_p` is 1.5"),
    "gamma": ({"gamma": 1.1}, "`gamma` is 1.1"),
    "kl_coef": ({"kl_coef": -0.1}, "`kl_coef` is -0.1"),
    "not a number": ({"kl_coef": float("nan")}, "`kl_coef` is nan"),
    "estimator": ({"kl_estimator": "k2"}, "`kl_estimator` is 'k2'"),
    "critic": ({"critic": "both"}, "`critic` is 'both'"),
    "path of a critic": ({"critic_model_name_or_path": "x"}, "`critic: separate`"),
    "adaptive without penalty": ({"adaptive_kl": True, "kl_coef": 0.0}, "`adaptive_kl` multiplies `kl_coef`"),
    "own fields": ({"generation_kwargs": {"max_new_tokens": 3}}, "sets 'max_new_tokens', which PPO sets itself"),
    "misspelt": ({"generation_kwargs": {"repetition_penality": 2}}, "Did you mean `repetition_penalty`"),
    "best model": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
        "`load_best_model_at_end` is True, which PPO does not support",
    ),
    "noise": ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is 5.0"),
    "columns": ({"remove_unused_columns": True}, "`remove_unused_columns` is true"),
    "batch size": ({"auto_find_batch_size": True}, "`auto_find_batch_size` is true"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_contradict_each_other_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_bfloat16_is_on_unless_another_precision_is_asked_for(tmp_path):
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    assert PPOConfig(**plain).bf16
    assert not PPOConfig(bf16=False, **plain).bf16
