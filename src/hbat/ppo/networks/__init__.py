"""Policy, critic and reference policy."""
