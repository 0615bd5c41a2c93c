"""One upgrade, killed or refused at each of its system calls in turn: what `make faults` runs."""
