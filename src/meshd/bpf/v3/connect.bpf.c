// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 3.0.0: a connect to a service's address goes to one of its backends, unless a policy denies it.
#include "mesh.h"

#define MAX_PICKS 4
#define MAX_BACKENDS 16
#define ECONNREFUSED 111
#define REFUSE 0 // EPERM unless said otherwise
#define PROCEED 1

struct backend {
	__u8 addr[16];
	__be16 port;
	__u16 zone; // 0: none given
	__u32 weight;
};

struct service {
	__u32 total_weight;
	__u32 count;
	struct backend backends[MAX_BACKENDS];
};

enum policy_action {
	POLICY_ALLOW,
	POLICY_DENY,
};

struct policy_key {
	__u64 source; // cgroup id of the client, 0 for anyone
	struct endpoint service;
	__u32 pad;
};

struct policy {
	enum policy_action action;
	__u64 hits MERGE(sum);
	__u64 last_ns MERGE(max);
};

// What one client's cgroup was denied, over all services.
struct denials {
	__u64 count MERGE(sum);
	__u64 last_ns MERGE(max);
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2048);
	__type(key, struct endpoint);
	__type(value, struct service);
} service SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct policy_key);
	__type(value, struct policy);
} policy SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct denials);
} denial SEC(".maps");

static __always_inline int allowed(const struct endpoint *to, __u64 client)
{
	struct policy_key key = { .source = client, .service = *to };
	struct policy *found = bpf_map_lookup_elem(&policy, &key);

	if (!found) {
		key.source = 0;
		found = bpf_map_lookup_elem(&policy, &key);
	}
	if (!found)
		return 1;
	__sync_fetch_and_add(&found->hits, 1);
	found->last_ns = bpf_ktime_get_ns();
	return found->action != POLICY_DENY;
}

static __always_inline void note_denial(const struct endpoint *to, __u64 client)
{
	struct denials none = {};
	struct denials *found = bpf_map_lookup_elem(&denial, &client);

	COUNT(to, denied);
	if (!found) {
		bpf_map_update_elem(&denial, &client, &none, BPF_NOEXIST);
		found = bpf_map_lookup_elem(&denial, &client);
		if (!found)
			return;
	}
	__sync_fetch_and_add(&found->count, 1);
	found->last_ns = bpf_ktime_get_ns();
}

enum choice {
	NO_SERVICE,
	NO_BACKEND,
	CHOSEN,
};

static __always_inline enum choice pick(const struct service *from, struct endpoint *backend)
{
	__u32 total = from->total_weight;
	__u32 left;
	int i;

	if (!total)
		return NO_BACKEND;
	left = bpf_get_prandom_u32() % total;
	for (i = 0; i < MAX_BACKENDS && i < from->count; i++) {
		const struct backend *one = &from->backends[i];

		if (left < one->weight) {
			__builtin_memcpy(backend->addr, one->addr, sizeof(backend->addr));
			backend->port = one->port;
			backend->proto = IPPROTO_TCP;
			return CHOSEN;
		}
		left -= one->weight;
	}
	return NO_BACKEND;
}

// A value that is replaced is at once free for another service, even while it is read here. So what was picked counts
// only if the value is still this service's afterwards.
static __always_inline enum choice choose(const struct endpoint *to, struct endpoint *backend)
{
	struct service *found = bpf_map_lookup_elem(&service, to);
	enum choice choice = NO_SERVICE;
	int i;

	for (i = 0; i < MAX_PICKS && found; i++) {
		struct service *picked_from = found;

		choice = pick(picked_from, backend);
		found = bpf_map_lookup_elem(&service, to);
		if (found == picked_from)
			return choice;
	}
	return found ? choice : NO_SERVICE;
}

// Leaves backend->port 0 when the connect is not to be sent elsewhere.
static __always_inline int route(struct bpf_sock_addr *ctx, const struct endpoint *to, struct endpoint *backend)
{
	struct bpf_sock *sk = ctx->sk;
	struct endpoint chosen = {};
	struct origin *from = 0;
	enum choice choice;
	__u64 client;

	if (!sk || ctx->protocol != IPPROTO_TCP)
		return PROCEED;
	client = bpf_get_current_cgroup_id();
	if (!allowed(to, client)) {
		note_denial(to, client);
		return REFUSE;
	}
	choice = choose(to, &chosen);
	if (choice == NO_SERVICE) {
		// The socket may have tried a service before.
		bpf_sk_storage_delete(&origin, sk);
		return PROCEED;
	}
	if (choice == CHOSEN)
		from = bpf_sk_storage_get(&origin, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!from) {
		COUNT(to, refused);
		bpf_set_retval(-ECONNREFUSED);
		return REFUSE;
	}
	*backend = chosen;
	from->service = *to;
	from->release = RELEASE;
	from->opened_ns = bpf_ktime_get_ns();
	from->client = client;
	note_flow(bpf_get_socket_cookie(ctx), from, backend, FLOW_CONNECTING, 0, BPF_ANY);
	COUNT(to, opened);
	return PROCEED;
}

SEC("cgroup/connect4")
int mesh_connect4(struct bpf_sock_addr *ctx)
{
	struct endpoint to = { .port = ctx->user_port, .proto = IPPROTO_TCP };
	struct endpoint backend = {};
	__u32 address = ctx->user_ip4;
	int verdict;

	to.addr[10] = 0xff;
	to.addr[11] = 0xff;
	__builtin_memcpy(&to.addr[12], &address, sizeof(address));
	verdict = route(ctx, &to, &backend);
	if (backend.port) {
		__builtin_memcpy(&address, &backend.addr[12], sizeof(address));
		ctx->user_ip4 = address;
		ctx->user_port = backend.port;
	}
	return verdict;
}

SEC("cgroup/connect6")
int mesh_connect6(struct bpf_sock_addr *ctx)
{
	struct endpoint to = { .port = ctx->user_port, .proto = IPPROTO_TCP };
	struct endpoint backend = {};
	__u32 address[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	int verdict;

	__builtin_memcpy(to.addr, address, sizeof(address));
	verdict = route(ctx, &to, &backend);
	if (backend.port) {
		__builtin_memcpy(address, backend.addr, sizeof(address));
		ctx->user_ip6[0] = address[0];
		ctx->user_ip6[1] = address[1];
		ctx->user_ip6[2] = address[2];
		ctx->user_ip6[3] = address[3];
		ctx->user_port = backend.port;
	}
	return verdict;
}

char _license[] SEC("license") = "Dual BSD/GPL";
