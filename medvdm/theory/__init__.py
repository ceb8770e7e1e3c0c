"""The mathematics: Gaussians, schedules, the bound, the sampler, and closed forms (chapters 1 to 6)."""
