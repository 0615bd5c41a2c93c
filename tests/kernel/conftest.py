"""The compiler that tests of layouts use serves here too."""

from tests.layout.conftest import compile_bpf

__all__ = ["compile_bpf"]
