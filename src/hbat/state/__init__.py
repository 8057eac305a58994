"""A run on disk.

`plan`: its rounds and stages. `run`: what is committed after a stage and read back on resume. `folder`, `history`,
`manifest`, `lock`, `files`: where and how. `fingerprint`, `changes`: whether it is the same run. `continued`: the run
before it. `last_stage`: its last stage, to choose a point of. `consolidation`: the importance that it accumulates.
"""
