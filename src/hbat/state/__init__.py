"""A run on disk.

`plan`: its rounds and stages. `run`: what is committed after a stage and read back on resume. `folder`, `history`:
which files it has. `manifest`: the state itself, with `RunStateError`. `files`: atomic writes, checksums,
`StorageError`. `lock`: one process a run. `fingerprint`, `changes`: whether it is the same run. `continued`: the run
before it. `last_stage`: its last stage, to choose a point of. `consolidation`: the importance that it accumulates.
`clock`: what its time is spent on.
"""
