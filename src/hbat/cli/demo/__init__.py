"""`hbat demo`: a generated language with exact checking, a small base model, the comparison and its results."""
