"""The model: `load` and `save`, `adapters` with the reference adapter, `copies` as reference policy."""
