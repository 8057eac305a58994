"""One stage: its trainer, callbacks, checkpoints and clean-up.

`runner` runs a stage; `builder` builds its trainer, `guard` cleans the models afterwards. `start` has the anchor and
the reference policy: `HBATTrainer` takes it before each stage (`EWCCallback` takes one of its own where an engine
holds more precise weights). `importance` is what a stage leaves, `path` its path integral, `replay` the SFT rows
mixed in, `moments` the optimizer state between stages, `learning_rate` its schedules, `checkpoints` and
`interruption` what resumes, `nonfinite` the stop at NaN, `costs` what it took, `callbacks` the rest. `rehearsal`
tries all trainers before the first stage; `lengths`, `shown_row` and `dropped_rows` say what they make of rows.
Between stages `evaluator` evaluates, `measurements` measures, with the `completions` of `sample_prompts`.
"""
