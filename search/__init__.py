"""What to try next: candidates, objectives, searchers and the loop."""
