/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fills the map of release 1, and tells what the map of release 2 holds.
 *
 *     entries fill COUNT MAP
 *     entries digest MAP
 */
#include <bpf/bpf.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "flow.h"

#define BATCH 16384

static struct flow_key keys[BATCH];
static struct flow_1 values_1[BATCH];
static struct flow_2 values_2[BATCH];

static void die(const char *what)
{
	fprintf(stderr, "entries: %s: %s\n", what, strerror(errno));
	exit(1);
}

static __u64 mix(__u64 x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static void fill(int fd, size_t count)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);

	for (size_t at = 0; at < count;) {
		__u32 part = count - at < BATCH ? (__u32)(count - at) : BATCH;

		for (__u32 i = 0; i < part; i++, at++) {
			__u64 *words = (__u64 *)&values_1[i];

			keys[i].address = (__u32)mix(at);
			keys[i].port = (__u16)at;
			keys[i].protocol = 6;
			keys[i].source = at; /* no two are the same */
			for (size_t word = 0; word < sizeof(values_1[i]) / 8; word++)
				words[word] = mix(at * 8 + word);
		}
		if (bpf_map_update_batch(fd, keys, values_1, &part, &opts))
			die("update_batch");
	}
}

/* The sum of a hash of each entry: the same for the same entries in any order. */
static void digest(int fd)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);
	__u32 position[2], turn = 0;
	__u64 sum = 0;
	size_t entries = 0;
	void *from = NULL;
	int last = 0;

	while (!last) {
		__u32 count = BATCH;

		if (bpf_map_lookup_batch(fd, from, &position[turn], keys, values_2, &count, &opts)) {
			if (errno != ENOENT)
				die("lookup_batch");
			last = 1;
		}
		from = &position[turn];
		turn ^= 1;
		for (__u32 i = 0; i < count; i++) {
			const __u64 *key = (const __u64 *)&keys[i], *value = (const __u64 *)&values_2[i];
			__u64 mark = mix(key[0]) ^ mix(key[1] * 3);

			for (size_t word = 0; word < sizeof(values_2[i]) / 8; word++)
				mark = mix(mark ^ value[word]);
			sum += mark;
		}
		entries += count;
	}
	printf("{\"entries\": %zu, \"digest\": \"%016llx\"}\n", entries, (unsigned long long)sum);
}

int main(int argc, char **argv)
{
	int fd = argc >= 3 ? bpf_obj_get(argv[argc - 1]) : -1;

	if (argc == 4 && !strcmp(argv[1], "fill") && fd >= 0)
		fill(fd, strtoul(argv[2], NULL, 10));
	else if (argc == 3 && !strcmp(argv[1], "digest") && fd >= 0)
		digest(fd);
	else
		die("usage: entries fill COUNT MAP | entries digest MAP");
	return 0;
}
