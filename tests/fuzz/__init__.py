"""A fuzzer over everything that reads bytes from strangers: objects, BTF, snapshots and manifests."""
