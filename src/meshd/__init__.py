"""meshd: a small L4 service mesh daemon on eBPF, upgraded with hitless."""
