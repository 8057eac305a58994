"""What a user can set: the run, EWC, and how sections are parsed."""
