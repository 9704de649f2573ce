"""Runs as a whole: trained, and opened again."""
