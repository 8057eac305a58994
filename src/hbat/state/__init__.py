"""A run on disk: plan, manifest, states, lock and fingerprint."""
