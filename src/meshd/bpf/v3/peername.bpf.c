// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 3.0.0: getpeername tells the service that a client connected to, not the backend it was sent to.
#include "origin.h"

static __always_inline struct origin *origin_of(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || ctx->protocol != IPPROTO_TCP)
		return 0;
	return bpf_sk_storage_get(&origin, sk, 0, 0);
}

SEC("cgroup/getpeername4")
int mesh_peername4(struct bpf_sock_addr *ctx)
{
	struct origin *from = origin_of(ctx);
	__u32 address;

	if (!from)
		return 1;
	__builtin_memcpy(&address, &from->service.addr[12], sizeof(address));
	ctx->user_ip4 = address;
	ctx->user_port = from->service.port;
	return 1;
}

SEC("cgroup/getpeername6")
int mesh_peername6(struct bpf_sock_addr *ctx)
{
	struct origin *from = origin_of(ctx);
	__u32 address[4];

	if (!from)
		return 1;
	__builtin_memcpy(address, from->service.addr, sizeof(address));
	ctx->user_ip6[0] = address[0];
	ctx->user_ip6[1] = address[1];
	ctx->user_ip6[2] = address[2];
	ctx->user_ip6[3] = address[3];
	ctx->user_port = from->service.port;
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
