"""Checkpoints of other libraries, in and out, number for number."""
