"""Kinds of routers, a file each, named as in `moe.router`."""
