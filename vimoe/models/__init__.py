"""A ViT, dense or with MoE layers: found, upcycled, counted, cut, saved and loaded."""
