"""Every kind of change that real releases made to their maps, by the real kernel: ``python -m tests.catalogue``."""
