"""Distillation as an objective: the stages of TRL's own trainer, with the teacher that the section names."""

import cases
import online_runs
import pytest
import runs
import trl

pytestmark = pytest.mark.skipif(
    not hasattr(trl, "DistillationTrainer"), reason="this TRL has no DistillationTrainer that is stable"
)


@pytest.fixture
def teacher(tmp_path):
    cases.tiny_llama(7).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def section(**options):
    return runs.section(max_completion_length=4, **options)


def run_of(folder, **options):
    from hbat import HBATConfig, HBATTrainer

    config = HBATConfig(
        output_dir=str(folder), objectives=["distillation"], num_rounds=2, ewc=None, optimizer_state="reset",
        disable_tqdm=True, seed=runs.SEED, distillation=section(**options),
    )  # fmt: skip
    rows = {"distillation": online_runs.prompts(8)}
    return HBATTrainer(cases.tiny_llama(), config, rows, processing_class=cases.tiny_tokenizer())


def test_stages_equal_those_of_plain_trainers(teacher, tmp_path):
    run = run_of(tmp_path / "run", teacher_model_name_or_path=teacher)
    run.train()
    weights = cases.weights(cases.tiny_llama())
    for number in range(2):
        model = runs.loaded(cases.tiny_llama, weights)
        options = section(teacher_model_name_or_path=teacher) | {"output_dir": str(tmp_path), "report_to": "none"}
        options["seed"] += number
        part = online_runs.prompts(8).select(runs.part_indices(8, 2, number, runs.SEED))
        trl.DistillationTrainer(
            model=model, teacher_model=teacher, args=trl.DistillationConfig(**options), train_dataset=part,
            processing_class=cases.tiny_tokenizer(),
        ).train()  # fmt: skip
        weights = cases.weights(model)
    assert runs.same(cases.weights(run.model), weights)


def test_the_teacher_is_loaded_once_with_its_options(teacher, tmp_path):
    run = run_of(tmp_path, teacher_model_name_or_path=teacher, teacher_model_init_kwargs={"dtype": "bfloat16"})
    loaded = run.tracks["distillation"].objective.teacher
    assert [str(model.dtype) for model in loaded.values()] == ["torch.bfloat16"]


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`distillation\.teacher_model_name_or_path` is missing"):
        run_of(tmp_path)
