"""The kernels that people run: tests inside virtual machines, and on other Pythons and libbpfs. See ``__main__``."""
