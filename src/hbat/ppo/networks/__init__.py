"""Policy, critic and reference policy: `policy_and_critic`, `reference`, and `token_model` for log-probabilities."""
