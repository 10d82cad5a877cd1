"""Benchmarks: ours and other libraries on the same tensors, in one run. They are not installed with apportion."""
