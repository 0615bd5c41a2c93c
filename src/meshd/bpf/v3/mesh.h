// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 3.0.0: what its objects share. Frozen: a later release has its own copy.
#pragma once

#include "origin.h"

#include <bpf/bpf_endian.h>

#define AF_INET 2
#define RELEASE 3
#define MERGE(how) __attribute__((btf_decl_tag("hitless:merge=" #how)))
#define WAS(name) __attribute__((btf_decl_tag("hitless:was=" #name)))

// The order is that of a connection's life: merge=max keeps what is over from coming back.
#define FLOW_CONNECTING 1
#define FLOW_ESTABLISHED 2
#define FLOW_CLOSED 3

struct flow_times {
	__u64 established_ns; // 0 until then
	__u64 start_ns WAS(opened_ns);
};

struct flow {
	struct endpoint service;
	struct endpoint backend;
	__u64 client; // cgroup id
	__u32 state MERGE(max);
	__u32 srtt_us; // smoothed round trip when established
	struct flow_times times;
};

struct counters {
	__u64 opened MERGE(sum);
	__u64 denied MERGE(sum);
	__u64 established MERGE(sum);
	__u64 closed MERGE(sum);
	__u64 failed MERGE(sum); // ended before they were established
	__u64 refused MERGE(sum);
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__type(key, __u64);
	__type(value, struct flow);
} flow SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct endpoint);
	__type(value, struct counters);
} service_counter SEC(".maps");

static __always_inline struct counters *counters_of(const struct endpoint *service)
{
	struct counters none = {};
	struct counters *found = bpf_map_lookup_elem(&service_counter, service);

	if (found)
		return found;
	bpf_map_update_elem(&service_counter, service, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&service_counter, service);
}

#define COUNT(service, field)                                                                                          \
	({                                                                                                             \
		struct counters *counted = counters_of(service);                                                       \
		if (counted)                                                                                           \
			__sync_fetch_and_add(&counted->field, 1);                                                      \
	})

static __always_inline void note_flow(__u64 cookie, const struct origin *from, const struct endpoint *backend,
				      __u32 state, __u32 srtt_us, __u64 flags)
{
	struct flow now = {
		.service = from->service,
		.backend = *backend,
		.client = from->client,
		.state = state,
		.srtt_us = srtt_us,
		.times.established_ns = state == FLOW_ESTABLISHED ? bpf_ktime_get_ns() : 0,
		.times.start_ns = from->opened_ns,
	};

	bpf_map_update_elem(&flow, &cookie, &now, flags);
}
