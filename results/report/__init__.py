"""The report and single pictures."""
