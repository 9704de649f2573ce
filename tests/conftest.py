"""Settings of every test."""

import torch

torch.set_num_threads(1)  # the models are tiny: threads only wait for one another, and much where the CPU is shared
