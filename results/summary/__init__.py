"""A run or several summed up for people."""
