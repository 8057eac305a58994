"""Options of a run and of EWC, with their help texts and checks."""
