"""``make bench``: how fast a map is copied, what memory that takes, and what its neighbours notice.

Every way of copying runs in turn, several rounds of all, each in a process of its own, in one lab; so one run on
one machine compares them. :mod:`benchmarks.report` holds the goals and says of each whether it was met.
"""
