"""Rows: loading, layouts, checks, chat templates and digests.

`sources` takes data as users name it: `load` reads files and has `DatasetError`, `layouts` recognises formats that are
not TRL's, `conversion` converts them, `origin` remembers where a row was. `check` runs the row checks: `formats` has
one per objective, `faults` and `turns` what they share, `template` those against tokenizer and model. `digest` tells
data sets apart.
"""
