"""Repositories of the host's in a guest, and a guest's changes of them back on the host."""
