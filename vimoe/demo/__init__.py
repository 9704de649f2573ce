"""Tours in a few minutes on handwritten digits."""
