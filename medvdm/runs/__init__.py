"""The whole job: settings in, a run folder out, and what is done with a trained run (chapters 12 to 14 and 18)."""
