"""Policy, critic and reference policy, token by token."""
