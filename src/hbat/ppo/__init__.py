"""Proximal policy optimization: `PPOTrainer` and `PPOConfig`.

- `config`: the options. `requirements`: what model, tokenizer and prompts must fulfil.
- `trainer`: the steps and the loss. `checkpoints`: saving and resuming. `maths`: the formulas, in torch alone.
- `networks/`: policy and critic, reference policy, log-probabilities per token.
- `rewards/`: reward functions and reward models, called together, weighted and summed.
- `rollouts/`: prompts, sampling, scoring and evaluation; the rollout; which rows each step trains on.
- `engine`: every call of `hbat.engines`, such as sharding policy, reference and critic.
"""
