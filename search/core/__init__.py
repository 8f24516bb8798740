"""The vocabulary that searchers, workers and results share."""
