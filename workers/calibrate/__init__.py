"""What the dense model does with text, measured once."""
