"""A model, read and run block by block."""
