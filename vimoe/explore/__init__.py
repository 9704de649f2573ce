"""An explorer of a run: what each MoE layer chose for an image, and what changes if it is overruled."""
