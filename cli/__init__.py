"""The command line: options to calls, nothing else."""
