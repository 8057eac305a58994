"""What a model can do, measured beside training: completions and what becomes of them, likelihoods, tasks.

`rows` reads what is asked; `completions` writes the answers down once, `metrics` counts in them and `judges` compares
them (`endpoint` asks a judge over HTTP); `likelihood` scores pairs and texts, `tasks` those of lm-eval. `suite` runs
all of it for one model and its folder.
"""
