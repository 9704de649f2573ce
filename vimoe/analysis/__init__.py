"""Which MoE layers specialise, whether it matters, and what can go."""
