"""One stage: its trainer, callbacks, checkpoints and clean-up.

`runner` runs a stage; `builder` builds its trainer, `guard` cleans the models afterwards. `start` has the anchor and
the reference policy (`EWCCallback` takes an anchor of its own where an engine holds more precise weights),
`importance` what a stage leaves, `path` its path integral, `replay` the SFT rows mixed in, `moments` the optimizer
state between stages, `learning_rate` its schedules, `checkpoints` and `interruption` what resumes, `nonfinite` the
stop at NaN, `callbacks` the rest. `rehearsal` tries all trainers before the first stage, `lengths` and `shown_row`
say what they make of rows, `evaluator` evaluates between stages.
"""
