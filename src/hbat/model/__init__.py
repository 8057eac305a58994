"""The model: `load` and `save`, `chat_template`, `copies` as reference policy, `adapters`, to `merge` into a base."""
