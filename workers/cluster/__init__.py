"""Measuring on many workers of a Ray cluster."""
