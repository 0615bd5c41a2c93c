// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 4.0.0: what comes to a server in the mesh is judged by where it comes from: TCP when it begins, UDP each time.
#include "policy.h"

#define ETH_P_IP 0x0800
#define DROP 0
#define PASS 1
#define SYN 0x02
#define ACK 0x10
#define MAX_HEADERS 8
#define HOP_BY_HOP 0
#define ROUTING 43
#define FRAGMENT 44
#define AUTHENTICATION 51
#define DESTINATION 60

struct inbound_key {
	__u32 prefixlen;
	__u8 proto;
	__u8 pad;
	__be16 port; // of the server, 0: any
	__u8 addr[16]; // of the client
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 32768);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct inbound_key);
	__type(value, struct policy);
} inbound SEC(".maps");

// Where TCP or UDP begins, 0 if that is too far inside.
static __always_inline __u32 transport_of(struct __sk_buff *skb)
{
	__u8 first, next, length;
	__u32 at = 40;
	int i;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		return bpf_skb_load_bytes(skb, 0, &first, 1) ? 0 : (first & 0xf) * 4;
	if (bpf_skb_load_bytes(skb, 6, &next, 1))
		return 0;
	for (i = 0; i < MAX_HEADERS; i++) {
		if (next == IPPROTO_TCP || next == IPPROTO_UDP)
			return at;
		if (next != HOP_BY_HOP && next != ROUTING && next != FRAGMENT && next != AUTHENTICATION &&
		    next != DESTINATION)
			return 0;
		if (bpf_skb_load_bytes(skb, at + 1, &length, 1))
			return 0;
		length = next == FRAGMENT ? 0 : length;
		first = next;
		if (bpf_skb_load_bytes(skb, at, &next, 1))
			return 0;
		at += first == AUTHENTICATION ? (length + 2) * 4 : (length + 1) * 8;
	}
	return 0;
}

SEC("cgroup_skb/ingress")
int mesh_inbound(struct __sk_buff *skb)
{
	struct inbound_key key = { .prefixlen = 8 * (sizeof(key) - sizeof(key.prefixlen)) };
	struct bpf_sock *sk = skb->sk;
	struct policy *found;
	__be16 port;
	__u32 at;

	if (!sk)
		return PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk || (sk->protocol != IPPROTO_TCP && sk->protocol != IPPROTO_UDP))
		return PASS;
	key.proto = sk->protocol;
	if (sk->protocol == IPPROTO_TCP && sk->state != BPF_TCP_LISTEN)
		return PASS;
	// A connected UDP socket hears only whom it chose.
	if (sk->protocol == IPPROTO_UDP && sk->state == BPF_TCP_ESTABLISHED)
		return PASS;
	at = transport_of(skb);
	if (sk->protocol == IPPROTO_TCP) {
		__u8 flags = SYN;

		// What cannot be read is judged, too: it may be the beginning of a connection.
		if (at && !bpf_skb_load_bytes(skb, at + 13, &flags, 1) && (flags & (SYN | ACK)) != SYN)
			return PASS;
	} else {
		struct reply_key answer = { .cookie = bpf_get_socket_cookie(skb), .backend.proto = IPPROTO_UDP };

		// An answer to a client in the mesh, not a question to a server.
		if (at && !bpf_skb_load_bytes(skb, at, &answer.backend.port, 2)) {
			if (skb->protocol == bpf_htons(ETH_P_IP)) {
				__u32 address = 0;

				bpf_skb_load_bytes(skb, 12, &address, 4);
				set_v4(&answer.backend, address);
			} else {
				bpf_skb_load_bytes(skb, 8, answer.backend.addr, 16);
			}
			if (bpf_map_lookup_elem(&reply, &answer))
				return PASS;
		}
	}
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		key.addr[10] = 0xff;
		key.addr[11] = 0xff;
		if (bpf_skb_load_bytes(skb, 12, &key.addr[12], 4))
			return DROP;
	} else if (bpf_skb_load_bytes(skb, 8, key.addr, 16)) {
		return DROP;
	}
	port = bpf_htons(sk->src_port);
	key.port = port;
	found = bpf_map_lookup_elem(&inbound, &key);
	if (!found) {
		key.port = 0;
		found = bpf_map_lookup_elem(&inbound, &key);
	}
	return !found || obey(found);
}

char _license[] SEC("license") = "Dual BSD/GPL";
