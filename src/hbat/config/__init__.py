"""Options with their defaults, help texts and checks.

`hbat`: those of a run. `ewc`: of EWC. `evaluation`: of what is measured. `chain`: which objectives a run has, and how
much of their data in which round. Those of PPO are in `hbat.ppo.config`, of a YAML file in `hbat.cli.run_file`, and
what a stage sets itself in `Objective.base_args` and `stage_args`. `fields` parses sections of any; `foreign` says
where keys of TRL's commands and other tools belong, `section_fields` which fields TRL's arguments have.
"""
