"""Every trial and measurement of a run, kept and read back."""
