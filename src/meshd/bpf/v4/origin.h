// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 4.0.0: what every hook knows of a socket. Frozen: a later release has its own copy.
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define IPPROTO_TCP 6
#define IPPROTO_UDP 17

// An IPv4 address is stored as ::ffff:a.b.c.d. Every byte takes part in the hash: zero pad.
struct endpoint {
	__u8 addr[16];
	__be16 port;
	__u8 proto;
	__u8 pad;
};

// Where a socket wanted to go. The same in every release, so that a hook of any release can tell what a hook of
// another one decided.
struct origin {
	struct endpoint service;
	__u32 release; // whose connect hook it was
	__u64 opened_ns;
	__u64 client;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin);
} origin SEC(".maps");

static __always_inline void set_v4(struct endpoint *to, __u32 address)
{
	// Keeps clang from merging loads of the context, which the verifier refuses.
	barrier_var(address);
	to->addr[10] = 0xff;
	to->addr[11] = 0xff;
	__builtin_memcpy(&to->addr[12], &address, sizeof(address));
}

static __always_inline __u32 v4_of(const struct endpoint *from)
{
	__u32 address;

	__builtin_memcpy(&address, &from->addr[12], sizeof(address));
	return address;
}

static __always_inline struct endpoint wanted4(const struct bpf_sock_addr *ctx)
{
	struct endpoint to = { .port = ctx->user_port, .proto = ctx->protocol };

	set_v4(&to, ctx->user_ip4);
	return to;
}

static __always_inline struct endpoint wanted6(const struct bpf_sock_addr *ctx)
{
	struct endpoint to = { .port = ctx->user_port, .proto = ctx->protocol };
	__u32 address[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };

	__builtin_memcpy(to.addr, address, sizeof(address));
	return to;
}

static __always_inline void say4(struct bpf_sock_addr *ctx, const struct endpoint *to)
{
	ctx->user_ip4 = v4_of(to);
	ctx->user_port = to->port;
}

static __always_inline void say6(struct bpf_sock_addr *ctx, const struct endpoint *to)
{
	__u32 address[4];

	__builtin_memcpy(address, to->addr, sizeof(address));
	ctx->user_ip6[0] = address[0];
	ctx->user_ip6[1] = address[1];
	ctx->user_ip6[2] = address[2];
	ctx->user_ip6[3] = address[3];
	ctx->user_port = to->port;
}
