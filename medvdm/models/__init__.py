"""The networks and the model composed of them (chapters 8 to 10 and 16)."""
