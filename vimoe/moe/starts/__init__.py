"""Starts of experts, a file each, named as in `moe.init`."""
