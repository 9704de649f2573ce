"""Semantic segmentation: scenes with a mask each, decoders on a ViT, inference and scores."""
