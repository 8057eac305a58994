"""Rows: loading, checks, chat templates and digests.

`load` reads files and has `DatasetError`; `check` runs the row checks: `formats` has one per objective, `faults` and
`turns` what they share, `template` those against tokenizer and model. `digest` tells data sets apart.
"""
