// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs that do next to nothing, so that what is in front of them can be measured. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} board_storage SEC(".maps");

SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx)
{
	return 1;
}

SEC("cgroup/getpeername4") int peername(struct bpf_sock_addr *ctx)
{
	return 1;
}

SEC("cgroup_skb/egress") int egress(struct __sk_buff *skb)
{
	return 1;
}

SEC("cgroup_skb/ingress") int ingress(struct __sk_buff *skb)
{
	return 1;
}

SEC("sockops") int ops(struct bpf_sock_ops *ctx)
{
	return 1;
}

SEC("xdp") int frame(struct xdp_md *ctx)
{
	return XDP_PASS;
}

/* At its first run it binds the socket of a test run, which no hook sees made, to epoch 1. */
SEC("cgroup_skb/egress") int bound(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	__u32 *word;

	if (!skb->mark && sk) {
		word = bpf_sk_storage_get(&board_storage, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (word)
			*word = 1;
		skb->mark = 1;
	}
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
