"""What a run shows: progress, log, forgetting matrix, plots and model card."""
