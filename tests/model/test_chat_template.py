import cases
import pytest
import runs
import torch
from peft import LoraConfig

from hbat.model.chat_template import set_chat_template

TEMPLATE = "{% for message in messages %}<|turn|>{{ message['content'] }}<|end|>{% endfor %}"


@pytest.fixture
def source(tmp_path):
    """The folder of a tokenizer with another template, two more tokens and another end token."""
    tokenizer = cases.tiny_tokenizer()
    tokenizer.add_tokens(["<|turn|>", "<|end|>"], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = "<|end|>", TEMPLATE
    tokenizer.save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


def given(template, *, model=None, adapter=False, seed=0):
    model, tokenizer = model or cases.tiny_llama(), cases.tiny_tokenizer()
    set_chat_template(template, model, tokenizer, gets_adapter=adapter, seed=seed)
    return model, tokenizer


@pytest.mark.parametrize("ending", [".jinja", ".j2", None])
def test_a_template_comes_from_a_file_or_is_given_itself(ending, tmp_path):
    template = TEMPLATE
    if ending:
        (tmp_path / f"chat{ending}").write_text(TEMPLATE, encoding="utf-8")
        template = str(tmp_path / f"chat{ending}")
    _, tokenizer = given(template)
    assert tokenizer.chat_template == TEMPLATE


def test_a_tokenizer_brings_its_tokens_and_its_end_and_every_token_has_an_embedding(source):
    model, tokenizer = given(source)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token_id == tokenizer.get_vocab()["<|end|>"]
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == cases.VOCABULARY_SIZE + 2
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_new_embeddings_follow_from_the_seed(source):
    new = [given(source, seed=seed)[0].get_input_embeddings().weight[-1] for seed in (5, 5, 6)]
    assert torch.equal(new[0], new[1])
    assert not torch.equal(new[0], new[2])


def test_new_tokens_that_an_adapter_does_not_train_are_named(source):
    with pytest.warns(UserWarning, match=r"adds 2 tokens, first '<\|turn\|>', .* which an adapter does not train"):
        given(source, adapter=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [("no/such.jinja", "there is no file /"), ("no/such/folder", "cannot be read from a tokenizer")],
)
def test_a_template_that_is_nowhere_is_refused(template, message):
    with pytest.raises(ValueError, match=rf"^`chat_template` is '{template}', but .*{message}"):
        given(template)


def test_tokens_under_an_adapter_that_exists_are_refused(source):
    with pytest.raises(ValueError, match=r"would resize the embeddings under an adapter that exists already"):
        given(source, model=cases.lora_llama())


@pytest.mark.filterwarnings("ignore:.*which an adapter does not train:UserWarning")
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")])
def test_the_template_of_one_section_serves_all_objectives_and_their_references(adapter, source, tmp_path):
    rows = {
        name: make(8, conversational=True) for name, make in (("sft", cases.sft_rows), ("dpo", cases.preference_rows))
    }
    run = runs.build_run(
        cases.tiny_llama(), tmp_path / "run", data=rows, sft={"chat_template_path": source}, peft_config=adapter
    )
    run.train()
    assert run.processing_class.chat_template == TEMPLATE
    assert run.model.get_input_embeddings().num_embeddings == len(run.processing_class)
    first = next(entry for entry in run.state.log_history if "dpo/rewards/chosen" in entry)
    assert first["dpo/rewards/chosen"] == 0.0


def test_two_templates_for_one_tokenizer_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"`chat_template` is .* and `sft.chat_template_path` is .* share one"):
        runs.build_run(cases.tiny_llama(), tmp_path, chat_template=TEMPLATE, sft={"chat_template_path": source})
