"""Who proposes candidates and learns from trials."""
