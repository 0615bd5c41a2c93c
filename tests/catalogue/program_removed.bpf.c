MAP(m, HASH, 8, __u32, __u64);
#ifndef NEW
SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx) { return 1; }
#endif
SEC("cgroup/connect6") int connect6(struct bpf_sock_addr *ctx) { return 1; }
