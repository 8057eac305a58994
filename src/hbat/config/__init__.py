"""Options of a run and of EWC, with their defaults, help texts and checks.

Options of PPO are in `hbat.ppo.config`, those of a run file in `hbat.cli.run_file`; `fields` parses sections of any.
`foreign` says where keys of TRL's commands and other tools belong, `section_fields` which fields TRL's arguments have.
"""
