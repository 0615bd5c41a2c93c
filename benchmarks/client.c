/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connects again and again and takes how long each connect() was.
 *
 *     client ADDRESS PORT OUT [CPU]
 *
 * It listens there itself and takes each connection after the clock was stopped, so no other task has a part in what
 * is measured. Says "ready", runs until its stdin ends, then writes to OUT one pair of 64-bit numbers for each
 * connect(): when it began (CLOCK_MONOTONIC) and how long it took, in nanoseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST (1ul << 25)

static volatile int over;

static void die(const char *what)
{
	fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
	exit(1);
}

static unsigned long now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return (unsigned long)at.tv_sec * 1000000000ul + (unsigned long)at.tv_nsec;
}

static void *wait_for_end(void *unused)
{
	char byte;

	while (read(0, &byte, 1) > 0)
		;
	over = 1;
	return unused;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	struct linger reset = { .l_onoff = 1 }; /* no TIME_WAIT, so ports do not run out */
	int yes = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	unsigned long (*taken)[2];
	pthread_t watcher;
	size_t seen = 0;
	FILE *out;

	if (argc != 4 && argc != 5)
		die("usage: client ADDRESS PORT OUT [CPU]");
	to.sin_port = htons((unsigned short)atoi(argv[2]));
	if (inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		die(argv[1]);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(listener, (struct sockaddr *)&to, sizeof(to)) || listen(listener, 128))
		die("listen");
	taken = mmap(NULL, MOST * sizeof(*taken), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		     -1, 0);
	if (taken == MAP_FAILED)
		die("mmap");
	madvise(taken, MOST * sizeof(*taken), MADV_HUGEPAGE);
	if (pthread_create(&watcher, NULL, wait_for_end, NULL))
		die("pthread_create");
	if (argc == 5) {
		cpu_set_t where;

		CPU_ZERO(&where);
		CPU_SET((unsigned int)atoi(argv[4]), &where);
		if (sched_setaffinity(0, sizeof(where), &where))
			die("sched_setaffinity");
	}
	puts("ready");
	fflush(stdout);
	while (!over && seen < MOST) {
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), other;
		unsigned long start = now();

		if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
			die("connect");
		taken[seen][1] = now() - start;
		taken[seen++][0] = start;
		other = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (other < 0)
			die("accept4");
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(fd);
		close(other);
	}
	out = fopen(argv[3], "w");
	if (!out || fwrite(taken, sizeof(*taken), seen, out) != seen || fclose(out))
		die(argv[3]);
	return 0;
}
