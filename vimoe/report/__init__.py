"""Pages written from the files of runs; no torch."""
