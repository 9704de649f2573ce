"""HTML pages about runs, written from their files. Imports no torch."""
