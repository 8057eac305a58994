"""Elastic weight consolidation: the mathematics (tensors in, tensors out) and, in `callback`, when it acts."""
