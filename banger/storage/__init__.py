"""How disks are made and mended."""
