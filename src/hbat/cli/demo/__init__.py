"""`hbat demo`: a small language model, two objectives that disagree, and HBAT beside two-stage training.

`task` is a generated language with exact checking, `settings` its sizes and rates, `base_model` the model that knows
it, `preference` the judge's pairs and rewards, `scoring` the measure, `run` the comparison, `results` its table and
picture.
"""
