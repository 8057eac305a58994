"""Names of the files in a run's folder that show the run. Its state is in `hbat.state.folder`."""

#: The log, as transformers writes it.
LOG_FILE = "trainer_state.json"
#: The forgetting matrix, and its picture.
SCORES_FILE = "evaluation.json"
PLOT_FILE = "evaluation.png"
#: Scores along the last stage, and their picture.
FRONT_FILE = "front.json"
FRONT_PLOT_FILE = "front.png"
COMPLETIONS_FILE = "completions.jsonl"
REPORT_FILE = "report.html"
#: The file of the command line that the run was made from.
RUN_FILE = "run.yaml"
#: What the run does now; gone when no process trains it.
PROGRESS_FILE = "progress.json"
