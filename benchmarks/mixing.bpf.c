// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A release whose programs note in each socket that they saw its connection. RELEASE comes from the command line. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} saw SEC(".maps"); /* the releases that a socket saw, a bit each */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 3);
	__type(key, __u32);
	__type(value, __u64);
} ends SEC(".maps"); /* of connections: those that saw the first release first, the second first, and both */

static void add(__u32 which)
{
	__u64 *count = bpf_map_lookup_elem(&ends, &which);

	if (count)
		__sync_fetch_and_add(count, 1);
}

static int note(struct bpf_sock *sk)
{
	__u64 *seen = bpf_sk_storage_get(&saw, sk, 0, BPF_SK_STORAGE_GET_F_CREATE), before;

	if (!seen)
		return 1;
	before = __sync_fetch_and_or(seen, 1 << RELEASE);
	if (!before)
		add(RELEASE);
	else if (before == 1 << !RELEASE)
		add(2);
	return 1;
}

/* Packets of a handshake are the listener's, which is older than its connections. */
static int packet(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : 0;

	return sk && sk->state != BPF_TCP_LISTEN ? note(sk) : 1;
}

SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx)
{
	return note(ctx->sk);
}

SEC("cgroup/getpeername4") int peername(struct bpf_sock_addr *ctx)
{
	return note(ctx->sk);
}

SEC("cgroup_skb/egress") int egress(struct __sk_buff *skb)
{
	return packet(skb);
}

SEC("cgroup_skb/ingress") int ingress(struct __sk_buff *skb)
{
	return packet(skb);
}

SEC("sockops") int ops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (sk && sk->state != BPF_TCP_LISTEN)
		note(sk);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
