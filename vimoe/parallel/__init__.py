"""Models spread over many processes: experts, FSDP, checkpoints that any number of processes opens."""
