"""The command line: run files, how `init` begins and `migrate` makes one, reward functions, and the demo."""
