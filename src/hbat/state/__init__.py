"""A run on disk.

`plan`: its rounds and stages. `run`: what is committed after a stage and read back on resume. `folder`, `history`,
`manifest`, `lock`, `files`: where and how. `fingerprint`, `changes`: whether it is the same run. `consolidation`: the
importance that it accumulates.
"""
