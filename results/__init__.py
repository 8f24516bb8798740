"""What was learned: the archive, fronts and tables."""
