// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 4.0.0: getpeername tells the service that a client connected to, not the backend it was sent to.
#include "origin.h"

static __always_inline struct origin *origin_of(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return 0;
	return bpf_sk_storage_get(&origin, sk, 0, 0);
}

SEC("cgroup/getpeername4")
int mesh_peername4(struct bpf_sock_addr *ctx)
{
	struct origin *from = origin_of(ctx);

	if (from)
		say4(ctx, &from->service);
	return 1;
}

SEC("cgroup/getpeername6")
int mesh_peername6(struct bpf_sock_addr *ctx)
{
	struct origin *from = origin_of(ctx);

	if (from)
		say6(ctx, &from->service);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
