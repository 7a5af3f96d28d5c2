"""What a model's responses look like, and whether training changed them for the better."""
