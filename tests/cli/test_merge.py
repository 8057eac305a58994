"""`hbat merge` on runs and folders: what it prints, and what it refuses before it loads a model."""

import pytest
import run_files
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hbat.cli.main import main
from hbat.state.manifest import decode, encode

pytest.importorskip("peft")


def train(folder, **options):
    """Train a run of SFT on a model in `base`; returns its file."""
    file = run_files.write(folder, run_files.save_model(folder / "base"))
    values = yaml.safe_load(file.read_text()) | {"objectives": ["sft"]} | options
    del values["dpo"], values["datasets"]["dpo"]
    file.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The file of a finished run that trained an adapter."""
    return train(tmp_path_factory.mktemp("run"), peft={"r": 2, "target_modules": "all-linear"})


@pytest.fixture
def merge(tmp_path, capsys):
    """Run `hbat merge SOURCE merged`; returns its status, what it prints and its error line."""

    def call(source, *words, status=0):
        capsys.readouterr()
        assert main(["merge", str(source), str(tmp_path / "merged"), *words]) == status
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err.splitlines()[-1].removeprefix("hbat: error: ")

    return call


@pytest.mark.parametrize("name", ["run.yaml", "out"])
def test_a_run_is_merged_by_its_file_or_its_folder(name, run, merge, tmp_path):
    out = merge(run.parent / name).splitlines()
    assert out[0] == f"Base:   {run.parent / 'base'}, in float32"
    assert out[1].startswith("Logits: ")
    parameters = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters()
    assert out[2].startswith(f"Model:  {tmp_path / 'merged'} (0.2 MB, {parameters:,} parameters in float32)")
    assert len(out) == 3
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_an_adapter_that_rounding_outweighs_is_told(run, merge, tmp_path):
    weights = load_file(run.parent / "out" / "adapter_model.safetensors")
    small = tmp_path / "small"
    small.mkdir()
    (small / "adapter_config.json").write_bytes((run.parent / "out" / "adapter_config.json").read_bytes())
    save_file({name: 1e-2 * weight for name, weight in weights.items()}, small / "adapter_model.safetensors")
    out = merge(small, "--dtype", "bfloat16")
    assert "Rounding to bfloat16 weighs as much as the adapter: try `--dtype float32`." in out
    assert ", in bfloat16" in out


def test_a_run_that_is_not_finished_is_not_merged(run, merge, tmp_path):
    state = run.parent / "out" / "hbat_state.json"
    whole, unfinished = state.read_bytes(), decode(state)
    unfinished.next_stage -= 1
    state.write_bytes(encode(unfinished))
    try:
        message = merge(run, status=2)
    finally:
        state.write_bytes(whole)
    assert "is not finished: 0 of its 1 stages are done. Finish it first" in message
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_not_empty_is_refused(run, merge, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").touch()
    assert "`DIR` names" in merge(run, status=2)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine"]


def test_options_of_a_run_file_are_refused_with_a_folder(run, merge):
    assert merge(run.parent / "out", "--num_rounds", "2", status=2).startswith("`--num_rounds` is for a run file, and")
    assert "holds no adapter" in merge(run, "--output_dir", str(run.parent / "base" / "none"), status=2)


def test_another_dtype_is_refused(run, merge):
    assert "invalid choice: 'int8'" in merge(run, "--dtype", "int8", status=2)


def test_the_run_of_a_full_model_has_nothing_to_merge(merge, tmp_path):
    file = train(tmp_path)
    assert f"{tmp_path / 'out'} holds a full model and no adapter" in merge(file, status=2)


def test_it_is_said_that_logits_of_a_quantized_base_were_others(merge, tmp_path):
    pytest.importorskip("bitsandbytes")
    file = train(tmp_path, peft={"r": 2, "target_modules": ["q_proj"]}, quantization={"load_in_4bit": True})
    said = "The adapter was trained on it in 4 or 8 bits: in float32 its logits are others."
    assert said in merge(tmp_path / "out")
    assert main(["clean", str(file)]) == 0
    (tmp_path / "merged").rename(tmp_path / "first")
    assert said in merge(file)
