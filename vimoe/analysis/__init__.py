"""Specialisation of MoE layers, its effect, and the removal of layers and experts without effect."""
