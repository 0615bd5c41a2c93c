// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 4.0.0: follows each connection to a service from its SYN to its end, and counts what it carried.
#include "mesh.h"

// Of the kernel's struct sock, what no helper tells.
struct sock_common {
	unsigned long skc_flags;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

#define SOCK_DONE (1UL << 1) // the peer's FIN has come

static __always_inline struct endpoint peer_of(struct bpf_sock_ops *ctx)
{
	struct endpoint peer = { .port = bpf_htons(bpf_ntohl(ctx->remote_port)), .proto = IPPROTO_TCP };

	if (ctx->family == AF_INET) {
		set_v4(&peer, ctx->remote_ip4);
	} else {
		__u32 address[4] = { ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3] };

		__builtin_memcpy(peer.addr, address, sizeof(address));
	}
	return peer;
}

// The kernel counts a SYN and a FIN as a byte each. `before` is the state that the socket was closed in.
static __always_inline __u64 bytes_sent(struct bpf_sock_ops *ctx, __u32 before)
{
	__u64 sent = ctx->bytes_acked;
	int fin = before == BPF_TCP_FIN_WAIT2 ||
		  ((before == BPF_TCP_LAST_ACK || before == BPF_TCP_CLOSING) && ctx->snd_una == ctx->snd_nxt);

	return sent > 1 + fin ? sent - 1 - fin : 0;
}

static __always_inline __u64 bytes_received(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u32 before)
{
	__u64 received = ctx->bytes_received;
	int fin = before == BPF_TCP_CLOSE_WAIT || before == BPF_TCP_LAST_ACK || before == BPF_TCP_CLOSING;

	if (before == BPF_TCP_FIN_WAIT2) {
		// Whether it came in this state, or the socket was only put aside to wait for it.
		struct sock *inner = (struct sock *)bpf_skc_to_tcp_sock(sk);

		fin = inner && (inner->__sk_common.skc_flags & SOCK_DONE);
	}
	return received > fin ? received - fin : 0;
}

static __always_inline void note_end(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct origin *from,
				     const struct endpoint *peer)
{
	struct counters *counted = counters_of(&from->service);
	__u32 before = ctx->args[0];
	__u32 failed = before == BPF_TCP_SYN_SENT;
	__u64 sent = 0, received = 0;
	__u32 srtt_us = 0, retransmits = ctx->total_retrans;
	struct access *line;

	if (!failed) {
		sent = bytes_sent(ctx, before);
		received = bytes_received(ctx, sk, before);
		srtt_us = ctx->srtt_us >> 3;
	}
	if (counted) {
		__sync_fetch_and_add(&counted->closed, 1);
		__sync_fetch_and_add(&counted->failed, failed);
		__sync_fetch_and_add(&counted->sent, sent);
		__sync_fetch_and_add(&counted->received, received);
		__sync_fetch_and_add(&counted->retransmits, retransmits);
		__sync_fetch_and_add(&counted->srtt_us, srtt_us);
	}
	line = new_access(&from->service, from->client, failed ? VERDICT_FAILED : VERDICT_CLOSED);
	if (!line)
		return;
	line->start_ns = from->opened_ns;
	line->backend = *peer;
	line->sent = sent;
	line->received = received;
	line->srtt_us = srtt_us;
	line->retransmits = retransmits;
	bpf_ringbuf_submit(line, 0);
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
		note_flow(cookie, from, &peer, FLOW_ESTABLISHED, ctx->srtt_us >> 3, BPF_ANY);
		COUNT(&from->service, established);
		return 1;
	}
	if (ctx->args[1] != BPF_TCP_CLOSE || ctx->args[0] == BPF_TCP_CLOSE)
		return 1;
	// What another release's connect hook noted, an upgrade may still bring here: leave word that it is over.
	if (from->release == RELEASE)
		bpf_map_delete_elem(&flow, &cookie);
	else
		note_flow(cookie, from, &peer, FLOW_CLOSED, 0, BPF_ANY);
	note_end(ctx, sk, from, &peer);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
