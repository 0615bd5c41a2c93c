/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The one map of the benchmark, in both releases: a field is widened and one is added. */
#ifndef BENCHMARKS_FLOW_H
#define BENCHMARKS_FLOW_H

#include <linux/types.h>

#ifdef __bpf__
#define TAG(text) __attribute__((btf_decl_tag("hitless:" text)))
#else
#define TAG(text)
#endif

struct flow_key {
	__u32 address;
	__u16 port;
	__u16 protocol;
	__u64 source;
};

struct flow_1 {
	__u32 hits TAG("merge=sum");
	__u32 state;
	__u64 first;
	__u64 last;
	__u64 bytes;
	__u32 path[8];
};

struct flow_2 {
	__u64 hits TAG("merge=sum");
	__u32 state;
	__u32 zone;
	__u64 first;
	__u64 last;
	__u64 bytes;
	__u32 path[8];
};

_Static_assert(sizeof(struct flow_key) == 16, "key");
_Static_assert(sizeof(struct flow_1) == 64, "value of release 1");
_Static_assert(sizeof(struct flow_2) == 72, "value of release 2");

#endif
