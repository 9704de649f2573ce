"""Measures of a model on labelled images."""
