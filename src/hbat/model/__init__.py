"""The model: `load`, `save`, `chat_template`, `adapters` with the reference adapter, `copies` as reference policy."""
