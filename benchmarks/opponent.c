/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an expert would write against libbpf, to be measured against: one thread, as hitless has.
 *
 *     opponent batch SIZE none|array|FILE SOURCE TARGET
 *     opponent single SOURCE TARGET
 *
 * `batch` reads, converts and writes SIZE entries at a time. With a base the kernel writes what it reads straight to
 * the base's next free places, so that keeping it costs no copy: in memory (`array`), or in a mapped FILE.
 * Protocol: says "ready", waits for a line, copies, says what it took as JSON.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "flow.h"

/* More than any bucket holds: what a batch may outgrow its size by. */
#define SLACK (1u << 17)
#define HUGE_PAGE (2ul << 20)

static void die(const char *what)
{
	fprintf(stderr, "opponent: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(clockid_t clock)
{
	struct timespec at;

	clock_gettime(clock, &at);
	return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static long status_bytes(const char *name)
{
	FILE *file = fopen("/proc/self/status", "r");
	char line[256];
	long kb = -1;

	if (!file)
		die("/proc/self/status");
	while (fgets(line, sizeof(line), file))
		if (!strncmp(line, name, strlen(name)))
			kb = strtol(line + strlen(name) + 1, NULL, 10);
	fclose(file);
	return kb * 1024;
}

static void reset_peak(void)
{
	int fd = open("/proc/self/clear_refs", O_WRONLY);

	if (fd < 0 || write(fd, "5", 1) != 1)
		die("/proc/self/clear_refs");
	close(fd);
}

/* Memory that is there when the kernel writes to it: one fault a huge page where the system has them. */
static void *room(size_t size, int populate)
{
	void *made;

	if (size >= HUGE_PAGE)
		size = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
	made = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (made == MAP_FAILED)
		die("mmap");
	made = (void *)(((unsigned long)made + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
	if (size >= HUGE_PAGE)
		madvise(made, size, MADV_HUGEPAGE);
	if (populate)
		madvise(made, size, MADV_POPULATE_WRITE);
	return made;
}

static void convert(const struct flow_1 *restrict from, struct flow_2 *restrict to, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		to[i].hits = from[i].hits;
		to[i].state = from[i].state;
		to[i].zone = 0;
		memcpy(&to[i].first, &from[i].first, sizeof(*to) - offsetof(struct flow_2, first));
	}
}

static __u32 max_entries(int fd)
{
	struct bpf_map_info info = {};
	__u32 size = sizeof(info);

	if (bpf_obj_get_info_by_fd(fd, &info, &size))
		die("map info");
	return info.max_entries;
}

struct base {
	struct flow_key *keys;
	struct flow_1 *values;
};

/* `expected` is what the base will surely hold; `capacity` what it may. */
static struct base make_base(const char *where, size_t capacity, size_t expected)
{
	size_t keys = capacity * sizeof(struct flow_key), values = capacity * sizeof(struct flow_1);
	struct base made;
	char *mapped;
	int fd;

	keys = (keys + 4095) / 4096 * 4096;
	if (!strcmp(where, "array")) {
		made.keys = room(keys, 0);
		made.values = room(values, 0);
	} else {
		fd = open(where, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
		if (fd < 0 || ftruncate(fd, (off_t)(keys + values)))
			die(where);
		mapped = mmap(NULL, keys + values, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (mapped == MAP_FAILED)
			die(where);
		close(fd);
		made.keys = (void *)mapped;
		made.values = (void *)(mapped + keys);
	}
	/* All pages by one call are cheaper than a fault for each. */
	madvise(made.keys, expected * sizeof(struct flow_key), MADV_POPULATE_WRITE);
	madvise(made.values, expected * sizeof(struct flow_1), MADV_POPULATE_WRITE);
	return made;
}

static size_t copy_batch(int source, int target, __u32 size, const char *where)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);
	int keeps = strcmp(where, "none") != 0;
	size_t entries = max_entries(source), capacity = entries + SLACK, done = 0;
	struct base base;
	struct flow_2 *new_values = room(size * sizeof(*new_values), 1);
	__u32 position[2], turn = 0;
	void *from = NULL;
	int last = 0;

	if (keeps)
		base = make_base(where, capacity, entries);
	else
		base = (struct base){ room(size * sizeof(*base.keys), 1), room(size * sizeof(*base.values), 1) };
	while (!last) {
		struct flow_key *keys = base.keys + (keeps ? done : 0);
		struct flow_1 *values = base.values + (keeps ? done : 0);
		__u32 count = size;

		if (keeps && done + size > capacity) {
			errno = E2BIG;
			die("the base");
		}
		if (bpf_map_lookup_batch(source, from, &position[turn], keys, values, &count, &opts)) {
			if (errno == ENOSPC && size < SLACK) { /* a bucket holds more than a batch */
				size *= 2;
				new_values = room(size * sizeof(*new_values), 1);
				if (!keeps)
					base = (struct base){ room(size * sizeof(*base.keys), 1),
							      room(size * sizeof(*base.values), 1) };
				continue;
			}
			if (errno != ENOENT)
				die("lookup_batch");
			last = 1;
		}
		from = &position[turn];
		turn ^= 1;
		if (!count)
			continue;
		convert(values, new_values, count);
		done += count;
		if (bpf_map_update_batch(target, keys, new_values, &count, &opts))
			die("update_batch");
	}
	return done;
}

static size_t copy_single(int source, int target)
{
	struct flow_key keys[2];
	struct flow_1 value;
	struct flow_2 new_value;
	const struct flow_key *before = NULL;
	size_t done = 0;

	for (int turn = 0; !bpf_map_get_next_key(source, before, &keys[turn]); turn ^= 1) {
		before = &keys[turn];
		if (bpf_map_lookup_elem(source, before, &value))
			continue; /* deleted meanwhile */
		convert(&value, &new_value, 1);
		if (bpf_map_update_elem(target, before, &new_value, BPF_ANY))
			die("update_elem");
		done++;
	}
	if (errno != ENOENT)
		die("get_next_key");
	return done;
}

int main(int argc, char **argv)
{
	int batch = argc == 6 && !strcmp(argv[1], "batch"), single = argc == 4 && !strcmp(argv[1], "single");
	int source, target;
	char line[16];
	size_t done;
	double start, cpu;
	long before;

	if (!batch && !single) {
		fprintf(stderr, "usage: opponent batch SIZE none|array|FILE SOURCE TARGET | opponent single SOURCE TARGET\n");
		return 2;
	}
	source = bpf_obj_get(argv[argc - 2]);
	target = bpf_obj_get(argv[argc - 1]);
	if (source < 0 || target < 0)
		die("opening the maps");
	puts("ready");
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	reset_peak();
	before = status_bytes("VmRSS");
	start = now(CLOCK_MONOTONIC);
	cpu = now(CLOCK_PROCESS_CPUTIME_ID);
	if (batch)
		done = copy_batch(source, target, (__u32)strtoul(argv[2], NULL, 10), argv[3]);
	else
		done = copy_single(source, target);
	cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
	start = now(CLOCK_MONOTONIC) - start;
	printf("{\"entries\": %zu, \"seconds\": %.6f, \"cpu\": %.6f, \"user\": %ld}\n", done, start, cpu,
	       status_bytes("VmHWM") - before);
	return 0;
}
