"""The metric language: what a pruning metric is."""
