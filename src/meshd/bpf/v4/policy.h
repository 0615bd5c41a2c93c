// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 4.0.0: what a policy's entry holds, whichever of the three kinds it is. Frozen: a later release has its own copy.
#pragma once

#include "mesh.h"

enum policy_action {
	POLICY_ALLOW,
	POLICY_DENY,
};

struct policy {
	enum policy_action action;
	__u64 hits MERGE(sum);
	__u64 last_ns MERGE(max);
};

// To whom an unconnected UDP socket spoke when it sent to a service: answers are shown to come from there.
struct reply_key {
	__u64 cookie;
	struct endpoint backend;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct reply_key);
	__type(value, struct endpoint);
} reply SEC(".maps");

static __always_inline int obey(struct policy *found)
{
	__sync_fetch_and_add(&found->hits, 1);
	found->last_ns = bpf_ktime_get_ns();
	return found->action != POLICY_DENY;
}
