"""Evaluations on the hub: what is pushed, what it says, how it is made again, and whether it is true."""
