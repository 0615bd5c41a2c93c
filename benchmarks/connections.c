/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opens connections, uses each at its beginning and at its end, and keeps it for a random while in between.
 *
 *     connections COUNT THREADS LONGEST
 *
 * COUNT connections in all, one at a time in each of THREADS threads, each to a listener of the thread's own and kept for
 * up to LONGEST microseconds. Says "ready", runs until COUNT were made or its stdin ends, then says how many there were.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static volatile int over;
static atomic_long wanted, made;
static unsigned int longest;

static void die(const char *what)
{
	fprintf(stderr, "connections: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void *wait_for_end(void *unused)
{
	char byte;

	while (read(0, &byte, 1) > 0)
		;
	over = 1;
	return unused;
}

static void use(int from, int to)
{
	struct sockaddr_in peer;
	socklen_t length = sizeof(peer);
	char byte = 0;

	if (getpeername(from, (struct sockaddr *)&peer, &length))
		die("getpeername");
	if (send(from, &byte, 1, 0) != 1 || recv(to, &byte, 1, 0) != 1)
		die("sending");
}

static void *connect_again(void *seed)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct linger reset = { .l_onoff = 1 }; /* no TIME_WAIT, so ports do not run out */
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	unsigned int random = (unsigned int)(unsigned long)seed;
	socklen_t length = sizeof(to);

	if (bind(listener, (struct sockaddr *)&to, sizeof(to)) || listen(listener, 8) ||
	    getsockname(listener, (struct sockaddr *)&to, &length))
		die("listen");
	while (!over && atomic_fetch_sub(&wanted, 1) > 0) {
		int client = socket(AF_INET, SOCK_STREAM, 0), server;

		if (connect(client, (struct sockaddr *)&to, sizeof(to)))
			die("connect");
		server = accept(listener, NULL, NULL);
		if (server < 0)
			die("accept");
		use(client, server);
		use(server, client);
		usleep((useconds_t)rand_r(&random) % (longest + 1));
		use(client, server);
		use(server, client);
		setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(client);
		close(server);
		atomic_fetch_add(&made, 1);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t watcher, *threads;
	long count;

	if (argc != 4)
		die("usage: connections COUNT THREADS LONGEST");
	wanted = atol(argv[1]);
	count = atol(argv[2]);
	longest = (unsigned int)atoi(argv[3]);
	threads = calloc((size_t)count, sizeof(*threads));
	puts("ready");
	fflush(stdout);
	if (pthread_create(&watcher, NULL, wait_for_end, NULL))
		die("pthread_create");
	for (long i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, connect_again, (void *)(i + 1)))
			die("pthread_create");
	for (long i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	printf("%ld\n", made);
	return 0;
}
