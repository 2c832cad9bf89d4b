"""Benchmarks: radixkv beside its peers and beside the machine's own limit, in the same run.

``python -m bench --help``; ``bench/peers/install.py`` makes the environment that has the peers.
"""
