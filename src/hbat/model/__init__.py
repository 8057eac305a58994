"""The model: load, save, adapters and copies."""
