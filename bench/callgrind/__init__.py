"""Instruction counts of the C library under callgrind: repeatable, so they can gate where times cannot."""
