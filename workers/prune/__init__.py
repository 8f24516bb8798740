"""A rule applied to a model, and the pruned model evaluated."""
