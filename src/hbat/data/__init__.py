"""Rows: loading, formats, faults, chat templates and digests."""
