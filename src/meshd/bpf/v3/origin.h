// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 3.0.0: what every hook knows of a socket. Frozen: a later release has its own copy.
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define IPPROTO_TCP 6

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
