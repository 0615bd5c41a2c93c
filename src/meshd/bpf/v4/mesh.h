// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 4.0.0: what its objects share. Frozen: a later release has its own copy.
#pragma once

#include "origin.h"

#include <bpf/bpf_endian.h>

#define AF_INET 2
#define RELEASE 4
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

// Of UDP only opened, denied and refused are counted: nobody can tell when a conversation ends.
struct counters {
	__u64 opened MERGE(sum);
	__u64 denied MERGE(sum);
	__u64 established MERGE(sum);
	__u64 closed MERGE(sum);
	__u64 failed MERGE(sum); // ended before they were established
	__u64 refused MERGE(sum);
	// Of connections that are closed.
	__u64 sent MERGE(sum); // bytes that the backend acknowledged
	__u64 received MERGE(sum); // bytes
	__u64 retransmits MERGE(sum); // segments
	__u64 srtt_us MERGE(sum); // smoothed round trips at their ends; by closed less failed it is the mean
};

// What the control plane switches, in its one entry.
struct settings {
	__u32 access_log; // 1: on
	__u32 unused;
};

enum verdict {
	VERDICT_CLOSED, // it was established, and is over
	VERDICT_FAILED, // it was never established
	VERDICT_REFUSED, // the service had no backend for it
	VERDICT_DENIED,
};

// A line of the access log.
struct access {
	__u64 start_ns; // CLOCK_MONOTONIC
	__u64 end_ns;
	__u64 client; // cgroup id
	__u64 sent;
	__u64 received;
	struct endpoint service;
	struct endpoint backend; // zero when there was none
	__u32 srtt_us;
	__u32 retransmits;
	__u32 verdict;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__type(key, __u64);
	__type(value, struct flow);
} flow SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct endpoint);
	__type(value, struct counters);
} service_counter SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} access SEC(".maps");

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

// A record to be filled and submitted, or null: the log is off, or its reader is too slow.
static __always_inline struct access *new_access(const struct endpoint *service, __u64 client, enum verdict verdict)
{
	__u32 only = 0;
	struct settings *set = bpf_map_lookup_elem(&settings, &only);
	struct access *made;

	if (!set || !set->access_log)
		return 0;
	made = bpf_ringbuf_reserve(&access, sizeof(*made), 0);
	if (!made)
		return 0;
	__builtin_memset(made, 0, sizeof(*made));
	made->start_ns = made->end_ns = bpf_ktime_get_ns();
	made->client = client;
	made->service = *service;
	made->verdict = verdict;
	return made;
}
