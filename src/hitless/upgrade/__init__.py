"""An upgrade, in the order in which it happens: node, plan, staging, passages, copy, merge, cutover, transaction.

Which phase follows which, and what a kill in each of them leaves to do, is data in ``phases``.
"""
