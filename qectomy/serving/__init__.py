"""Reduced checkpoints in engines that others write. Nothing here is imported by the rest of the package."""
