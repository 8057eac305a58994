"""A run on disk: its plan, folder, manifest, lock, fingerprint, and what it carries from stage to stage."""
