"""A cluster in miniature: nodes that are labs, a control plane, and a rollout as a DaemonSet does it."""
