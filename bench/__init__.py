"""Benchmarks: radixkv beside its peers and beside the machine's own limit, in the same run. ``python -m bench --help``."""
