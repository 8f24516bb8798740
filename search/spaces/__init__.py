"""What can vary: metrics, ratios, and the numbers that stand for them."""
