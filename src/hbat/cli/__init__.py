"""The command line: run files, reward functions, and the demo."""
