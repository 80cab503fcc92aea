"""Layers of images, joined into one archive: nothing of them is ever unpacked on this host."""
