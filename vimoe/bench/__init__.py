"""Cost of an MoE layer, or of a model with some, beside dense FFNs of the same arithmetic, in time and memory."""
