// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A release: one map, and a connect hook that counts in it. RELEASE, ENTRIES and FLAGS come from the command line. */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"

#if RELEASE == 1
typedef struct flow_1 flow_value;
#else
typedef struct flow_2 flow_value;
#endif

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENTRIES);
	__uint(map_flags, FLAGS);
	__type(key, struct flow_key);
	__type(value, flow_value);
} flow SEC(".maps");

SEC("cgroup/connect4") int count(struct bpf_sock_addr *ctx)
{
	struct flow_key key = {
		.address = ctx->user_ip4,
		.port = bpf_ntohs((__u16)ctx->user_port),
		.protocol = (__u16)ctx->protocol,
	};
	flow_value *found = bpf_map_lookup_elem(&flow, &key);

	if (!found) {
		flow_value none = {};

		bpf_map_update_elem(&flow, &key, &none, BPF_NOEXIST);
		found = bpf_map_lookup_elem(&flow, &key);
	}
	if (found)
		__sync_fetch_and_add(&found->hits, 1);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
