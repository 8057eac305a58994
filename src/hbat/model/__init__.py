"""The model: `load`, `save`, `chat_template`, `copies` as reference policy, `adapters`, and `merge` into a base."""
