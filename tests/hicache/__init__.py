"""Tests of the HiCache facade: against the original, and the defects that must not come back."""
