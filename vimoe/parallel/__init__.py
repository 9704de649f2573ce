"""Models spread over many processes: starting these, experts, FSDP, checkpoints that any number of processes opens."""
