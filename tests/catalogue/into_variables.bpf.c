#ifdef NEW
__u32 node_ip = 1;
__u32 log_level = 1;
MAP(spare, HASH, 8, __u32, __u64);
SEC("cgroup/connect4") int used(struct bpf_sock_addr *ctx) { return node_ip + log_level > 0; }
#else
struct config { __u32 log_level; __u32 node_ip; };
MAP(config, ARRAY, 1, __u32, struct config);
#endif
