"""Hold a model against held-out images, closed-form baselines and its own samples (chapters 13, 15 and 19)."""
