"""Names of the files in a run's folder that show the run. Its state is in `hbat.state.folder`."""

#: The log, as transformers writes it.
LOG_FILE = "trainer_state.json"
#: The forgetting matrix, and its picture.
SCORES_FILE = "evaluation.json"
PLOT_FILE = "evaluation.png"
#: Scores along the last stage, and their picture.
FRONT_FILE = "front.json"
FRONT_PLOT_FILE = "front.png"
#: Completions and judgments of `evaluation`, in a folder for each stage.
EVAL_FOLDER = "evaluation"
COMPLETIONS_FILE = "completions.jsonl"
REPORT_FILE = "report.html"
#: The file of the command line that the run was made from.
RUN_FILE = "run.yaml"
#: What the run does now; gone when no process trains it.
PROGRESS_FILE = "progress.json"
#: Scores of the models that `hbat eval` measured, and their picture; those of the runs of `hbat sweep`.
EVAL_FILE = "evaluation.json"
EVAL_PLOT_FILE = "evaluation.png"
SWEEP_FILE = "sweep.json"
SWEEP_PLOT_FILE = "sweep.png"
