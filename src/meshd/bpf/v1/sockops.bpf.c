// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 1.0.0: follows each connection to a service from its SYN to its end.
#include "mesh.h"

static __always_inline struct endpoint peer_of(struct bpf_sock_ops *ctx)
{
	struct endpoint peer = { .port = bpf_htons(bpf_ntohl(ctx->remote_port)), .proto = IPPROTO_TCP };

	if (ctx->family == AF_INET) {
		__u32 address = ctx->remote_ip4;

		// Keeps clang from merging both branches into one load at a computed offset, which the verifier refuses.
		barrier_var(address);
		peer.addr[10] = 0xff;
		peer.addr[11] = 0xff;
		__builtin_memcpy(&peer.addr[12], &address, sizeof(address));
	} else {
		__u32 address[4] = { ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3] };

		__builtin_memcpy(peer.addr, address, sizeof(address));
	}
	return peer;
}

SEC("sockops")
int mesh_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct endpoint peer;
	struct origin *from;
	__u32 op = ctx->op;
	__u64 cookie;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	if (!sk)
		return 1;
	from = bpf_sk_storage_get(&origin, sk, 0, 0);
	if (!from)
		return 1;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
		return 1;
	}
	cookie = bpf_get_socket_cookie(ctx);
	peer = peer_of(ctx);
	if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB) {
		note_flow(cookie, from, &peer, FLOW_ESTABLISHED, BPF_ANY);
		COUNT(&from->service, established);
		return 1;
	}
	if (ctx->args[1] != BPF_TCP_CLOSE || ctx->args[0] == BPF_TCP_CLOSE)
		return 1;
	// What another release's connect hook noted, an upgrade may still bring here: leave word that it is over.
	if (from->release == RELEASE)
		bpf_map_delete_elem(&flow, &cookie);
	else
		note_flow(cookie, from, &peer, FLOW_CLOSED, BPF_ANY);
	COUNT(&from->service, closed);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
