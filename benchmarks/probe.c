/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A task that wants its CPU and notices when it does not get it.
 *
 *     probe fifo|fair|busy CPU
 *
 * `fifo` and `fair` sleep until a time 1 ms ahead, again and again, and take how late they were woken: `fifo` goes
 * before every ordinary task, so what delays it is only what the kernel does not interrupt; `fair` is an ordinary
 * task, as most are. `busy` never sleeps and takes the longest time between two looks at the clock; it shares the
 * CPU, so it also sees the other's fair turns. Says "ready", runs until its stdin ends, says what it saw as JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PERIOD 1000000ll
#define MOST (1u << 22)

static unsigned int late[MOST]; /* nanoseconds */
static volatile int over;

static void die(const char *what)
{
	fprintf(stderr, "probe: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000ll + at.tv_nsec;
}

static void *wait_for_end(void *unused)
{
	char byte;

	while (read(0, &byte, 1) > 0)
		;
	over = 1;
	return unused;
}

static size_t sleep_and_wake(void)
{
	long long next = now();
	size_t seen = 0;

	while (!over && seen < MOST) {
		struct timespec at;
		long long woken;

		next += PERIOD;
		at.tv_sec = next / 1000000000ll;
		at.tv_nsec = next % 1000000000ll;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
		woken = now();
		late[seen++] = (unsigned int)(woken - next);
		if (woken > next + PERIOD) /* what came late is counted once */
			next = woken;
	}
	return seen;
}

/* The gaps that are worth a word: those longer than an interrupt takes. */
static size_t look_at_clock(void)
{
	long long before = now();
	size_t seen = 0;

	while (!over && seen < MOST) {
		long long at = now();

		if (at - before > 100000)
			late[seen++] = (unsigned int)(at - before);
		before = at;
	}
	return seen;
}

static int ascending(const void *a, const void *b)
{
	unsigned int x = *(const unsigned int *)a, y = *(const unsigned int *)b;

	return (x > y) - (x < y);
}

static double micro(size_t seen, double part)
{
	return seen ? late[(size_t)((double)(seen - 1) * part)] / 1e3 : 0;
}

int main(int argc, char **argv)
{
	struct sched_param first = { .sched_priority = 50 };
	pthread_t watcher;
	cpu_set_t where;
	size_t seen;

	if (argc != 3)
		die("usage: probe fifo|fair|busy CPU");
	/* The thread that waits for the end is made first: it is neither pinned nor first in line. */
	if (pthread_create(&watcher, NULL, wait_for_end, NULL))
		die("pthread_create");
	CPU_ZERO(&where);
	CPU_SET((unsigned int)atoi(argv[2]), &where);
	if (sched_setaffinity(0, sizeof(where), &where))
		die("sched_setaffinity");
	memset(late, 0, sizeof(late));
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		die("mlockall");
	if (!strcmp(argv[1], "fifo") && sched_setscheduler(0, SCHED_FIFO, &first))
		die("SCHED_FIFO");
	puts("ready");
	fflush(stdout);
	seen = strcmp(argv[1], "busy") ? sleep_and_wake() : look_at_clock();
	qsort(late, seen, sizeof(*late), ascending);
	printf("{\"samples\": %zu, \"p50\": %.1f, \"p99\": %.1f, \"longest\": %.1f}\n", seen, micro(seen, 0.5),
	       micro(seen, 0.99), micro(seen, 1));
	return 0;
}
