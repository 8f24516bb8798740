"""Memory and time of a search, beforehand."""
