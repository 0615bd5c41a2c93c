"""An upgrade, in the order in which it happens: bundle, node, plan, copy, merge, cutover, transaction."""
