"""What a step costs and what it could cost at least (chapter 20)."""
