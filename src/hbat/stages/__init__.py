"""One stage: its trainer, callbacks, checkpoints and clean-up.

`runner` runs a stage; `builder` builds its trainer, `guard` cleans the models afterwards. `start` has the anchor and
the reference policy, `importance` what a stage yields, `moments` the optimizer state between stages, `learning_rate`
its schedules, `checkpoints` and `interruption` what resumes, `nonfinite` the stop at NaN, `callbacks` the rest.
`rehearsal` tries all trainers before the first stage, `evaluator` evaluates between stages.
"""
