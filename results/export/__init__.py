"""Rules and runs in the forms of other tools, out and in."""
