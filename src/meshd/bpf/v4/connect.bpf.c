// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// mesh 4.0.0: a connect or a datagram to a service's address goes to one of its backends, unless a policy denies it.
#include "policy.h"

#define MAX_PICKS 8
#define ECONNREFUSED 111
#define REFUSE 0 // EPERM unless said otherwise
#define PROCEED 1

// Where the backends of a service's table are, seen from this node.
enum level {
	LEVEL_ANY, // it was not asked for
	LEVEL_NODE,
	LEVEL_ZONE,
	LEVEL_REGION,
	LEVEL_FAR, // none is nearer
};

// Who gets a service's connections is in the slots of its table. A table never changes: the control plane writes
// another one beside it, puts that one's number here, and then deletes the old one.
struct service {
	__u32 table;
	__u32 count; // slots
	__u32 affinity_s; // how long a client keeps its backend, 0: it does not
	enum level level;
	__u32 known; // backends that the control plane knows, with those that are not in the table
	__u32 healthy; // of these; none: the table has all, since nobody knows better
};

struct slot_key {
	__u32 table;
	__u32 index;
};

// By the alias method: whoever draws this slot stays with a chance of cut / 2^32, and goes to the slot alias otherwise.
struct slot {
	__u8 addr[16];
	__be16 port;
	__u16 flags; // none yet
	__u32 cut;
	__u32 alias;
	__u32 weight; // what the control plane said; the program does not look at it
};

// Who is in a table, where somebody may come back to his backend.
struct member {
	__u32 table;
	__be16 port;
	__u16 pad;
	__u8 addr[16];
};

struct policy_key {
	__u64 source; // cgroup id of the client, 0 for anyone
	struct endpoint service;
	__u32 pad;
};

struct outbound_key {
	__u32 prefixlen;
	__u32 source[2]; // cgroup id as two words, since the prefix before it has four bytes
	__u8 proto;
	__u8 pad;
	__be16 port; // 0: any
	__u8 addr[16];
};

// What one client's cgroup was denied, over all services.
struct denials {
	__u64 count MERGE(sum);
	__u64 last_ns MERGE(max);
};

enum client_kind {
	CLIENT_NETNS, // session affinity: a pod has a network namespace of its own
	CLIENT_SOCKET, // an unconnected UDP socket keeps its backend, whatever the service's affinity
};

struct client_key {
	__u64 client; // cookie
	struct endpoint service;
	enum client_kind kind;
};

struct kept {
	struct endpoint backend;
	__u32 pad;
	__u64 last_ns;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_RDONLY_PROG);
	__type(key, struct endpoint);
	__type(value, struct service);
} service SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_RDONLY_PROG);
	__type(key, struct slot_key);
	__type(value, struct slot);
} slot SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_RDONLY_PROG);
	__type(key, struct member);
	__type(value, __u32);
} member SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct client_key);
	__type(value, struct kept);
} affinity SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768); // twice as many as there may be: new ones come before old ones go
	__type(key, struct policy_key);
	__type(value, struct policy);
} policy SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 32768);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct outbound_key);
	__type(value, struct policy);
} outbound SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct denials);
} denial SEC(".maps");

static __always_inline struct policy *outbound_of(struct outbound_key *key, __u64 source, __be16 port)
{
	__builtin_memcpy(key->source, &source, sizeof(source));
	key->port = port;
	return bpf_map_lookup_elem(&outbound, key);
}

static __always_inline int allowed(const struct endpoint *to, __u64 client)
{
	struct policy_key key = { .source = client, .service = *to };
	struct policy *found = bpf_map_lookup_elem(&policy, &key);

	if (!found) {
		key.source = 0;
		found = bpf_map_lookup_elem(&policy, &key);
	}
	if (!found) {
		struct outbound_key out = { .prefixlen = 8 * (sizeof(out) - sizeof(out.prefixlen)), .proto = to->proto };

		__builtin_memcpy(out.addr, to->addr, sizeof(out.addr));
		found = outbound_of(&out, client, to->port);
		if (!found)
			found = outbound_of(&out, client, 0);
		if (!found)
			found = outbound_of(&out, 0, to->port);
		if (!found)
			found = outbound_of(&out, 0, 0);
	}
	return !found || obey(found);
}

static __always_inline void note_denial(const struct endpoint *to, __u64 client)
{
	struct denials none = {};
	struct denials *found = bpf_map_lookup_elem(&denial, &client);
	struct access *line = new_access(to, client, VERDICT_DENIED);

	if (line)
		bpf_ringbuf_submit(line, 0);
	// What is no service has no counters, or a client could fill their map.
	if (bpf_map_lookup_elem(&service, to))
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
	KEPT, // the one that the client had before
};

static __always_inline int draw(const struct service *from, struct endpoint *backend)
{
	__u32 random = bpf_get_prandom_u32();
	struct slot_key key = { .table = from->table, .index = bpf_get_prandom_u32() % from->count };
	struct slot *found = bpf_map_lookup_elem(&slot, &key);

	if (found && random >= found->cut && found->alias != key.index) {
		key.index = found->alias;
		found = bpf_map_lookup_elem(&slot, &key);
	}
	if (!found)
		return 0;
	__builtin_memcpy(backend->addr, found->addr, sizeof(backend->addr));
	backend->port = found->port;
	return 1;
}

// The backend that this client has, if it may still have it.
static __always_inline int keep(const struct service *from, const struct client_key *who, struct endpoint *backend)
{
	struct kept *kept = bpf_map_lookup_elem(&affinity, who);
	struct member key = { .table = from->table };

	if (!kept)
		return 0;
	// Signed: another connect of this client may have written a later time meanwhile.
	if (who->kind == CLIENT_NETNS && (__s64)(bpf_ktime_get_ns() - kept->last_ns) > from->affinity_s * 1000000000LL)
		return 0;
	__builtin_memcpy(backend->addr, kept->backend.addr, sizeof(backend->addr));
	backend->port = kept->backend.port;
	__builtin_memcpy(key.addr, backend->addr, sizeof(key.addr));
	key.port = backend->port;
	return bpf_map_lookup_elem(&member, &key) != 0;
}

// What is deleted is at once free for another service, even while it is read here. So what was picked counts only if
// the service has the same table afterwards: its slots are deleted later than that.
static __always_inline enum choice choose(struct client_key *who, int keeps, struct endpoint *backend)
{
	int i;

	for (i = 0; i < MAX_PICKS; i++) {
		struct service *found = bpf_map_lookup_elem(&service, &who->service);
		enum choice choice = NO_BACKEND;
		struct service seen;

		if (!found)
			return NO_SERVICE;
		seen = *found;
		if (seen.count) {
			if ((keeps || seen.affinity_s) && keep(&seen, who, backend))
				choice = KEPT;
			else if (draw(&seen, backend))
				choice = CHOSEN;
		}
		found = bpf_map_lookup_elem(&service, &who->service);
		if (found && found->table == seen.table && found->count == seen.count)
			return choice;
	}
	return NO_BACKEND;
}

static __always_inline __u32 affinity_of(const struct endpoint *to)
{
	struct service *found = bpf_map_lookup_elem(&service, to);

	return found ? found->affinity_s : 0;
}

// Leaves backend->port 0 when what was asked for is no service, or is refused. `datagram`: of an unconnected socket.
static __always_inline int route(struct bpf_sock_addr *ctx, const struct endpoint *to, struct endpoint *backend,
				 int datagram)
{
	struct client_key who = { .service = *to, .kind = CLIENT_NETNS };
	struct endpoint chosen = { .proto = to->proto };
	struct bpf_sock *sk = ctx->sk;
	struct origin *from = 0;
	enum choice choice;
	__u64 client;
	int keeps;

	// Not by to->proto, which has one byte: MPTCP is 6 there.
	if (!sk || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return PROCEED;
	client = bpf_get_current_cgroup_id();
	if (!allowed(to, client)) {
		note_denial(to, client);
		return REFUSE;
	}
	keeps = affinity_of(to) != 0;
	if (datagram && !keeps) {
		who.kind = CLIENT_SOCKET;
		who.client = bpf_get_socket_cookie(ctx);
		keeps = 1;
	} else {
		who.client = bpf_get_netns_cookie(ctx);
	}
	choice = choose(&who, keeps, &chosen);
	if (choice == NO_SERVICE) {
		// The socket may have tried a service before.
		if (!datagram)
			bpf_sk_storage_delete(&origin, sk);
		return PROCEED;
	}
	if (choice != NO_BACKEND && !datagram)
		from = bpf_sk_storage_get(&origin, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (choice == NO_BACKEND || (!datagram && !from)) {
		struct access *line = new_access(to, client, VERDICT_REFUSED);

		if (line)
			bpf_ringbuf_submit(line, 0);
		COUNT(to, refused);
		bpf_set_retval(-ECONNREFUSED);
		return REFUSE;
	}
	*backend = chosen;
	if (keeps) {
		struct kept now = { .backend = chosen, .last_ns = bpf_ktime_get_ns() };
		struct kept *before = choice == KEPT ? bpf_map_lookup_elem(&affinity, &who) : 0;

		if (before)
			before->last_ns = now.last_ns;
		else
			bpf_map_update_elem(&affinity, &who, &now, BPF_ANY);
	}
	if (to->proto == IPPROTO_UDP) {
		struct reply_key key = { .cookie = bpf_get_socket_cookie(ctx), .backend = chosen };
		struct endpoint *known = bpf_map_lookup_elem(&reply, &key);

		if (!known || __builtin_memcmp(known, to, sizeof(*to)))
			bpf_map_update_elem(&reply, &key, to, BPF_ANY);
	}
	if (!datagram) {
		from->service = *to;
		from->release = RELEASE;
		from->opened_ns = bpf_ktime_get_ns();
		from->client = client;
		if (to->proto == IPPROTO_TCP)
			note_flow(bpf_get_socket_cookie(ctx), from, backend, FLOW_CONNECTING, 0, BPF_ANY);
	}
	if (!datagram || choice == CHOSEN)
		COUNT(to, opened);
	return PROCEED;
}

SEC("cgroup/connect4")
int mesh_connect4(struct bpf_sock_addr *ctx)
{
	struct endpoint to = wanted4(ctx), backend = {};
	int verdict = route(ctx, &to, &backend, 0);

	if (backend.port)
		say4(ctx, &backend);
	return verdict;
}

SEC("cgroup/connect6")
int mesh_connect6(struct bpf_sock_addr *ctx)
{
	struct endpoint to = wanted6(ctx), backend = {};
	int verdict = route(ctx, &to, &backend, 0);

	if (backend.port)
		say6(ctx, &backend);
	return verdict;
}

SEC("cgroup/sendmsg4")
int mesh_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct endpoint to = wanted4(ctx), backend = {};
	int verdict = route(ctx, &to, &backend, 1);

	if (backend.port)
		say4(ctx, &backend);
	return verdict;
}

SEC("cgroup/sendmsg6")
int mesh_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct endpoint to = wanted6(ctx), backend = {};
	int verdict = route(ctx, &to, &backend, 1);

	if (backend.port)
		say6(ctx, &backend);
	return verdict;
}

static __always_inline struct endpoint *asked(struct bpf_sock_addr *ctx, const struct endpoint *from)
{
	struct reply_key key = { .cookie = bpf_get_socket_cookie(ctx), .backend = *from };

	return bpf_map_lookup_elem(&reply, &key);
}

SEC("cgroup/recvmsg4")
int mesh_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct endpoint from = wanted4(ctx);
	struct endpoint *shown = asked(ctx, &from);

	if (shown)
		say4(ctx, shown);
	return 1;
}

SEC("cgroup/recvmsg6")
int mesh_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct endpoint from = wanted6(ctx);
	struct endpoint *shown = asked(ctx, &from);

	if (shown)
		say6(ctx, shown);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
