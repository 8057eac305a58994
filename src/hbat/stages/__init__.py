"""One stage: its trainer, callbacks, checkpoints and clean-up."""
