"""Names the cffi module, the one thing about the build that pyproject.toml cannot say."""

from setuptools import setup

setup(cffi_modules=["src/hitless/kernel/libbpf_build.py:ffi"])
