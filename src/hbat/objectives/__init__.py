"""What a stage minimises: the contract and the objectives that come with the library.

`objective` is the contract, and `sft`, `dpo`, `kto`, `ppo`, `online` (GRPO, RLOO), `distillation` and `trl_ppo`
(TRL's PPO) fulfil it; `built_in` finds them by name. `track` is an objective of a run with its arguments and its
rows, which it has checked. `rewards` hands reward functions to the online objectives; `hbat.ppo.rewards` calls them.
"""
