"""One training step, the loop around it, and what keeps both safe (chapters 11 and 17)."""
