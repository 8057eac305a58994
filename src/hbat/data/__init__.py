"""Rows: loading, layouts, checks, chat templates and digests.

`sources` takes data as users name it: `load` reads files and has `DatasetError`, `layouts` recognises formats that
are not TRL's, `conversion` converts them, `origin` remembers where a row was. `check` runs the checks of rows:
`formats` has those of SFT, preferences, KTO and prompts, `faults` and `turns` what they share, `template` those
against tokenizer and model. `Objective.row_check` chooses one; `objectives/track.py` and `ppo/requirements.py` call
them. `digest` tells data sets apart.
"""
