"""The upgrade transaction explored: as a model in every interleaving, and as it is in random ones."""
