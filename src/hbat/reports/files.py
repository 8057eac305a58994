"""Names of the files in a run's folder that show the run. Its state is in `hbat.state.folder`."""

#: The log, as transformers writes it.
LOG_FILE = "trainer_state.json"
#: The forgetting matrix, or the scores of the models that `hbat eval` measured, and their picture.
SCORES_FILE = "evaluation.json"
PLOT_FILE = "evaluation.png"
#: Scores along the last stage, and their picture.
FRONT_FILE = "front.json"
FRONT_PLOT_FILE = "front.png"
#: Completions and judgments of `evaluation`, in a folder for each stage; those of `hbat eval` in one for each model.
EVAL_FOLDER = "evaluation"
SETTINGS_FILE = "settings.json"
JUDGMENTS_FILE = "judgments.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
REPORT_FILE = "report.html"
#: The file of the command line that the run was made from.
RUN_FILE = "run.yaml"
#: What the run does now; gone when no process trains it.
PROGRESS_FILE = "progress.json"
#: Scores of the runs of `hbat sweep`, and their picture.
SWEEP_FILE = "sweep.json"
SWEEP_PLOT_FILE = "sweep.png"
