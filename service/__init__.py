"""What a person asks for, as functions with plain arguments."""
