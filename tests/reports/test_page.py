"""The pages that show a run, and several runs: what they say is what lies in the runs' folders."""

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import cases
import pytest
import runs
from datasets import Dataset
from transformers import TrainerCallback

from hbat.cli.main import main
from hbat.reports.comparison import differences, pareto, write_comparison
from hbat.reports.matrix import ForgettingMatrix
from hbat.reports.page import score_rows, settings, try_report
from hbat.reports.plots import curve
from hbat.reports.record import RunRecord, read_completions
from hbat.state.manifest import RunStateError

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "link", "hr", "img", "input"}


class Read(HTMLParser):
    """What a page holds: its text, its addresses, and whether every element ends where it should."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids, self.text, self.drawn = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [value for name, value in attrs if name in {"href", "src", "xlink:href"}]
        if "id" in given and "svg" not in self.open:
            self.ids.append(given["id"])
        if tag == "figure":
            self.drawn.append(given["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def __contains__(self, text):
        return text in " ".join(" ".join(self.text).split())


def page(file):
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "url(http" not in text
    assert "@import" not in text
    read = Read(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in read.addresses)  # nothing is loaded
    assert len(read.ids) == len({*read.ids})
    links = {
        address[1:] for address in read.addresses if re.fullmatch("#(?![mp][0-9a-f]{10})[a-z]+(-[0-9]+)?", address)
    }
    assert links == {*read.ids}
    return read


class Look(TrainerCallback):
    """Asks for the status while the second stage trains."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if "stage-001" in args.output_dir and state.global_step == 1:
            main(["status", str(self.folder)])


class Cut(TrainerCallback):
    """Ends the run in the middle of its second stage."""

    def on_step_end(self, args, state, control, **kwargs):
        if "stage-001" in args.output_dir and state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with all that can be shown: two rounds, evaluation, completions, a front."""
    where = tmp_path_factory.mktemp("runs") / "<held> & back"
    held_out = {"sft": cases.sft_rows(4, seed=5), "dpo": cases.preference_rows(4, seed=5)}
    run = runs.train(
        cases.tiny_llama(), where, evaluation=held_out, ewc={"strength": 0.5}, sample_prompts=["1 plus <b>2</b>?"]
    )
    run.front([0, 0.5, 1])
    run.save_model()
    return where


@pytest.fixture(scope="module")
def other(folder):
    where = folder.parent / "free"
    held_out = {"sft": cases.sft_rows(4, seed=5), "dpo": cases.preference_rows(4, seed=6)}
    runs.train(cases.tiny_llama(), where, evaluation=held_out)
    return where


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """A run without scores that ended in the middle of its second stage, and what was said of it just before."""
    where, said = tmp_path_factory.mktemp("cut-off"), io.StringIO()
    faulty = Dataset.from_list([*cases.sft_rows(8), {"prompt": "1 plus 1?", "completion": ""}])
    options = {"data": runs.rows() | {"sft": faulty}, "on_bad_rows": "drop", "num_rounds": 1}
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(said):
        runs.train(cases.tiny_llama(), where, callbacks=[Look(where), Cut()], **options)
    return where, said.getvalue()


def test_the_page_of_a_run_says_what_its_files_say(folder):
    read = page(folder / "report.html")  # which saving the model wrote
    scores = json.loads((folder / "evaluation.json").read_text())
    for row in scores["rows"]:
        assert f"{row['scores']['sft']['loss']:.4f}" in read
        assert row["objective"] is None or f"{row['scores']['dpo']['rewards/margins']:.4f}" in read
    for value in (scores["backward_transfer"]["sft"], scores["forgetting"]["sft"]):
        assert f"{value:+.4f}" in read
    assert "on the evaluation rows (4 sft, 4 dpo)" in read
    for row in read_completions(folder):
        assert " ".join(row["completion"].split()) in read
    assert "1 plus <b>2</b>?" in read  # escaped
    assert "sft.learning_rate" in read
    assert "<held> & back" in read
    state = RunRecord.read(folder).state
    assert state.versions["trl"] in read
    titles = [label.partition(":")[0] for label in read.drawn]
    assert titles == [
        "Training", "Penalty against task", "Scores over the stages", "Trade-off", "Predicted and measured forgetting",
        "Time of the stages", "Importance",
    ]  # fmt: skip


def test_the_importance_that_is_shown_sums_to_one_for_each_objective(folder):
    found = RunRecord.read(folder).importance()
    assert found.keys() == {"sft", "dpo"}
    for shares in found.values():
        assert sum(shares.values()) == pytest.approx(1.0)
        assert {layer for layer, _ in shares} == {-1, 0, 1}
        assert {"q_proj", "lm_head", "input_layernorm"} <= {module for _, module in shares}


def test_the_page_of_a_run_that_was_cut_off_shows_what_is_done_and_what_was_dropped(cut_off, capsys):
    where, _ = cut_off
    assert main(["report", str(where)]) == 0
    assert str(where / "report.html") in capsys.readouterr().out
    read = page(where / "report.html")
    assert "1 of 2 stages are done" in read
    assert "The run has no evaluation rows" in read
    assert [label.partition(":")[0] for label in read.drawn] == ["Training", "Time of the stages"]
    assert "8 (completion, prompt); 1 more were faulty and dropped" in read


def test_a_run_on_a_lora_adapter_shows_the_modules_that_it_adapts(tmp_path):
    runs.train(cases.lora_llama(), tmp_path, ewc={"strength": 0.5}, num_rounds=1)
    for shares in RunRecord.read(tmp_path).importance().values():
        assert not [module for _, module in shares if module.startswith("lora")]
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) >= 0


def test_texts_without_scores_make_no_empty_tables(tmp_path, capsys):
    run = runs.train(cases.tiny_llama(), tmp_path, sample_prompts=["1 plus 2?"], num_rounds=1, disable_tqdm=False)
    run.save_model()
    assert "Scores:" not in capsys.readouterr().err
    assert not (tmp_path / "evaluation.png").exists()
    read = page(tmp_path / "report.html")
    assert "The run has no evaluation rows" in read
    assert "Scores over the stages" not in [label.partition(":")[0] for label in read.drawn]
    assert "Scores after each stage" not in (tmp_path / "README.md").read_text()


def test_a_run_that_starts_over_shows_nothing_of_the_one_before(tmp_path):
    held_out = {"sft": cases.sft_rows(4, seed=5), "dpo": cases.preference_rows(4, seed=5)}
    runs.train(cases.tiny_llama(), tmp_path, evaluation=held_out, sample_prompts=["old"], num_rounds=1).front([0, 1])
    runs.train(cases.tiny_llama(), tmp_path, overwrite_output_dir=True, num_rounds=1)
    record = RunRecord.read(tmp_path)
    assert (record.front, record.completions, record.matrix.scored) == (None, [], [])


def test_scores_on_other_rows_than_the_last_are_not_set_beside_these(folder):
    record = RunRecord.read(folder)
    record.matrix.rows[0]["data"]["sft"] = "other rows"
    (_, first), *_ = score_rows(record.matrix)
    assert first[0].text == "not evaluated"
    assert first[1].text != "not evaluated"


def test_names_that_mean_something_to_matplotlib_are_drawn_as_they_are(other, tmp_path):
    for name in ("lr_$x^$_2", "_plain"):
        shutil.copytree(other, tmp_path / name)
    write_comparison([tmp_path / "lr_$x^$_2", tmp_path / "_plain"], tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert text.count("lr_$x^$_2") > 3
    assert text.count("_plain</text>") == 3


def test_numbers_that_are_none_do_not_end_a_curve():
    log = [{"a": value, "step": step} for step, value in enumerate([1.0, math.inf, -math.inf, math.nan, 3.0])]
    steps, values = curve(log, "a")
    assert (steps[:2], values[:2]) == ([0.0, 4.0], [1.0, 3.0])


def test_a_damaged_newest_state_leaves_the_one_before_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "hbat_state.json").write_text("{")
    assert len(RunRecord.read(tmp_path / "run").stages_done) == 3
    (tmp_path / "run" / "hbat_state.previous.json").unlink()
    with pytest.raises(RunStateError, match="cannot be read"):
        RunRecord.read(tmp_path / "run")


def test_a_long_log_is_shown_as_means_that_are_few(tmp_path):
    log = [{"sft/loss": float(step % 2), "hbat/stage": step // 50_000, "step": step} for step in range(100_000)]
    steps, values = curve(log, "sft/loss")
    assert len(steps) < 700
    gaps = [index for index, value in enumerate(values) if value != value]  # noqa: PLR0124 - NaN
    assert len(gaps) == 2
    assert all(value == pytest.approx(0.5, abs=0.01) for index, value in enumerate(values) if index not in gaps)


def test_a_page_that_cannot_be_written_is_a_warning(folder, caplog):
    try_report(folder / "no run")
    assert "report.html could not be written" in caplog.text


def test_damaged_files_beside_the_state_leave_gaps_in_the_page(other, capsys):
    (other / "front.json").write_text('{"rows": []}')
    (other / "completions.jsonl").write_text('{"stage": 0}\n')
    for name in ("trainer_state.json", "evaluation.json"):
        whole = (other / name).read_text()
        (other / name).write_text(whole[: len(whole) // 2])
        assert main(["report", str(other)]) == 0
        page(other / "report.html")
        (other / name).write_text(whole)
    capsys.readouterr()


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    for command in ("report", "status", "compare"):
        assert main([command, str(tmp_path)]) == 2
        assert "holds no run" in capsys.readouterr().err
    with pytest.raises(RunStateError):
        RunRecord.read(tmp_path)


# --- several runs ----------------------------------------------------------------------------------------------------


def test_the_comparison_shows_scores_differences_and_other_rows(folder, other, tmp_path, capsys):
    file = tmp_path / "both.html"
    assert main(["compare", str(folder), str(other), "--output", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    read = page(file)
    for each in (folder, other):
        last = json.loads((each / "evaluation.json").read_text())["rows"][-1]["scores"]
        assert f"{last['sft']['loss']:.4f}" in read
    assert "evaluated on different rows of dpo" in read
    found = dict(differences([RunRecord.read(folder), RunRecord.read(other)]))
    assert found == {"ewc": ["defaults", "none"]}
    assert [label.partition(":")[0] for label in read.drawn] == ["Trade-off", "Training"]


def test_measurements_are_not_set_against_what_was_trained():
    matrix = ForgettingMatrix({"sft": "loss", "dpo": "loss"})
    for name in ("completions", "rouge", "pairs"):
        matrix.add_column(name, "score", "higher")
    assert matrix.traded(["sft", "dpo", "completions", "rouge", "pairs"]) == ["sft", "dpo"]
    assert matrix.traded(["sft", "rouge", "pairs"]) == ["sft", "rouge", "pairs"]


def test_a_share_has_its_interval_and_the_start_of_the_first_run_is_the_reference():
    rows = {None: 0.5, "sft": 0.0, "dpo": 1.0}
    scores = [{"dpo": {"loss": 0.7, "rewards/accuracies": value}} for value in rows.values()]
    matrix = ForgettingMatrix({"dpo": "loss"}, counts={"dpo": 6})
    for stage, (objective, each) in enumerate(zip(rows, scores, strict=True), -1):
        matrix.add(stage=stage, round_number=1, objective=objective, scores=each)
    accuracies = [cells[1] for _, cells in score_rows(matrix)]
    assert [cell.text for cell in accuracies] == ["reference", "0.0000", "1.0000"]
    assert [cell.interval for cell in accuracies] == ["", "[0.00, 0.39]", "[0.61, 1.00]"]  # Wilson's
    matrix.rows.append({**matrix.rows[0], "stage": 2})  # the start of a run that continues this one
    assert [cells[1].text for _, cells in score_rows(matrix)][-1] == "0.5000"


def test_a_continued_run_without_scores_of_its_own_shows_none(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    assert RunRecord.read(tmp_path / "run").matrix.scored == []


def test_runs_without_scores_cannot_be_compared(cut_off, tmp_path, capsys):
    assert main(["compare", str(cut_off[0]), "--output", str(tmp_path / "page.html")]) == 2
    assert "no objective in common that was evaluated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]], [True, True, False]),
        ([[1.0, 1.0], [1.0, 1.0]], [True, True]),
        ([[1.0, math.nan], [2.0, 2.0]], [False, True]),
        ([[math.nan, math.nan], [1.0, 1.0]], [False, True]),
        ([[1.0, 2.0], [1.0, 3.0]], [True, False]),
    ],
)
def test_a_run_is_marked_that_no_other_one_beats(scores, best):
    assert pareto(scores) == best


def test_settings_are_those_that_were_set_and_the_runs_own(folder):
    record = RunRecord.read(folder)
    own, everything = settings(record), settings(record, everything=True)
    assert own.items() <= everything.items()
    assert own["run.num_rounds"] == "2"
    assert "ewc.strength" not in own
    assert everything["ewc.strength"] == "0.5"


def test_what_only_reads_a_run_imports_no_library_that_trains(folder):
    program = (
        "import sys; from hbat.cli.main import main\n"
        "assert main(['status', sys.argv[1]]) == main(['report', sys.argv[1]]) == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert not {"transformers", "trl", "peft", "datasets", "accelerate"} & {*done.stdout.split()}


# --- hbat status -----------------------------------------------------------------------------------------------------


def test_the_status_of_a_finished_run_is_its_table(folder, capsys):
    assert main(["status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "Finished." in said
    last = json.loads((folder / "evaluation.json").read_text())["rows"][-1]["scores"]
    assert f"{last['dpo']['loss']:.4f}" in said
    assert said.count("round 2: ") == 2


def test_the_status_of_a_run_under_way_says_where_it_is(cut_off):
    assert re.search(r"Now \([\d:]+, process \d+\): round 1/1 dpo: 0/2", cut_off[1])


def test_the_status_of_a_run_that_was_cut_off_says_how_to_resume(cut_off, capsys):
    assert main(["status", str(cut_off[0])]) == 0
    assert (
        "Interrupted: 1 of 2 stages are left. Resume with `hbat train --config FILE --resume`."
        in capsys.readouterr().out
    )


def test_every_costs_row_belongs_to_a_stage_or_an_evaluation(folder):
    costs = RunRecord.read(folder).state.costs
    assert [(cost["stage"], cost.get("objective")) for cost in costs] == [
        (-1, None), (0, "sft"), (0, None), (1, "dpo"), (1, None), (2, "sft"), (2, None), (3, "dpo"), (3, None),
    ]  # fmt: skip
    for cost in costs:
        assert 0 < sum(cost.get(what, 0.0) for what in ("evaluation", "saving", "ewc")) <= cost["seconds"]
        if "objective" in cost:
            assert (cost["steps"], cost["tokens"] > 0, cost["ewc"] > 0, cost["saving"] > 0) == (2, True, True, True)
        else:
            assert cost["evaluation"] > 0
    assert all(Path(folder / name).is_file() for name in ("report.html", "completions.jsonl", "front.png"))
