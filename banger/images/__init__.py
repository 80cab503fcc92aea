"""Where images and kernels come from, and how they are kept."""
