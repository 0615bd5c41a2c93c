"""The demo: a real mesh in a laboratory of its own, upgraded again and again under traffic.

Run it with ``python -m meshd.demo`` (or ``make demo``).
"""
