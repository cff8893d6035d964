"""Models of other programs here, and ours there."""
