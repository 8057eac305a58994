"""What `hbat demo` runs on: a generated language with exact checking, a small base model, and the scores."""
