"""Types of maps as the C compiler laid them out: read, compared, converted. Pure Python over bytes.

The way through it: :mod:`~hitless.layout.elf` and :mod:`~hitless.layout.btf` make bytes into the values of
:mod:`~hitless.layout.model`; :mod:`~hitless.layout.diff` compares two of them, by the words of
:mod:`~hitless.layout.rules`, and gives a :mod:`~hitless.layout.conversion`. Beside it: :mod:`~hitless.layout.codec`
for values, :mod:`~hitless.layout.snapshot` to keep layouts, :mod:`~hitless.layout.show` to print them. Nothing here
knows a kernel, so nothing here needs root, libbpf or Linux.
"""
