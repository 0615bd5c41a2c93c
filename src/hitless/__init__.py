"""hitless: zero-disruption upgrades of running eBPF daemons."""
