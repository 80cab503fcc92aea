"""Measure banger on this machine: `python -m bench` prints one line a figure."""
