/* Where a connection goes: from the address of a service to one of its backends. */
#include "kmesh.h"

KM_FRONTEND;
KM_SERVICE;
KM_ENDPOINT;
KM_BACKEND;
KM_POLICIES;
KM_MANAGE;
KM_TALLY;
KM_HOOKS;
KM_ORIG_DST;
KM_CGR_TAILCALL;

/* The node's agent says that a pod is ours by a connection to this address and port, which goes nowhere. */
#define CONTROL_ADDR bpf_htonl(2)
#define CONTROL_PORT bpf_htons(929)

enum { DENY = 1 };
enum { TO_POLICY };

static __always_inline struct backend_value *choose(struct bpf_sock_addr *ctx, const __u32 *addr, __u32 *service_id,
                                                    __u32 *uid, __u16 *port)
{
    struct frontend_key front = {};
    __builtin_memcpy(front.addr, addr, sizeof(front.addr));
    struct frontend_value *upstream = bpf_map_lookup_elem(&km_frontend, &front);
    if (!upstream)
        return 0;
    struct service_key wanted = {.service_id = upstream->upstream_id};
    if (upstream->upstream_id >> 24 != KIND_SERVICE)
        return 0;
    struct service_value *service = bpf_map_lookup_elem(&km_service, &wanted);
    if (!service || !service->endpoint_count)
        return 0;
    struct endpoint_key place = {};
    place.service_id = wanted.service_id;
    place.backend_index = bpf_get_prandom_u32() % service->endpoint_count;
    struct endpoint_value *endpoint = bpf_map_lookup_elem(&km_endpoint, &place);
    if (!endpoint)
        return 0;
    struct backend_key one = {.backend_uid = endpoint->backend_uid};
    *service_id = wanted.service_id;
    *uid = one.backend_uid;
    *port = service->target_port[0];
    if (bpf_htons(service->service_port[0]) != (__u16)ctx->user_port)
        return 0;
    return bpf_map_lookup_elem(&km_backend, &one);
}

static __always_inline int is_managed(struct bpf_sock_addr *ctx)
{
    struct manage_key own = {.netns_cookie = bpf_get_netns_cookie(ctx)};
    return bpf_map_lookup_elem(&km_manage, &own) != 0;
}

static __always_inline void remember(struct bpf_sock_addr *ctx, __u32 vip, __u32 service_id, __u32 uid)
{
    struct sock_value *kept = ctx->sk ? bpf_sk_storage_get(&km_orig_dst, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE) : 0;
    if (!kept)
        return;
    kept->vip = vip;
    kept->vip_port = bpf_ntohs(ctx->user_port);
    kept->service_id = service_id;
    kept->backend_uid = uid;
#if RELEASE >= 2
    kept->first_seen = bpf_ktime_get_ns();
#endif
}

/* 0 refuses the connection. */
static __always_inline int allowed(__u32 service_id, __u32 uid)
{
    struct service_key wanted = {.service_id = service_id};
    struct service_value *service = bpf_map_lookup_elem(&km_service, &wanted);
    struct backend_key one = {.backend_uid = uid};
    struct tally_value none = {}, *tally = bpf_map_lookup_elem(&TALLY, &one);
    if (!tally) {
        bpf_map_update_elem(&TALLY, &one, &none, BPF_NOEXIST);
        tally = bpf_map_lookup_elem(&TALLY, &one);
    }
    struct policy_key which = {.policy_id = service ? service->policy_id : 0};
    struct policy_value *policy = bpf_map_lookup_elem(&km_authz_policies, &which);
    if (policy)
        __sync_fetch_and_add(&policy->hits, 1);
    int denied = policy && policy->action == DENY;
    if (tally) {
        if (denied)
            __sync_fetch_and_add(&tally->denied, 1);
        else
            __sync_fetch_and_add(&tally->connects, 1);
        tally->last_service = service_id;
    }
    return !denied;
}

SEC("cgroup/connect4")
int cgroup_connect4_prog(struct bpf_sock_addr *ctx)
{
    __u32 addr[4] = {ctx->user_ip4}, service_id = 0, uid = 0;
    __u16 port = 0;
    if (ctx->user_ip4 == CONTROL_ADDR && (__u16)ctx->user_port == CONTROL_PORT) {
        struct manage_key own = {.netns_cookie = bpf_get_netns_cookie(ctx)};
        struct manage_value mark = {.marked = 1};
        bpf_map_update_elem(&km_manage, &own, &mark, BPF_ANY);
        return 0;
    }
    if (!is_managed(ctx))
        return 1;
    struct backend_value *backend = choose(ctx, addr, &service_id, &uid, &port);
    if (!backend)
        return 1;
    COUNT(AT_CONNECT4, 0);
    remember(ctx, addr[0], service_id, uid);
    ctx->user_ip4 = backend->addr[0];
    ctx->user_port = bpf_htons(port);
    bpf_tail_call(ctx, &km_cgr_tailcall, TO_POLICY);
    COUNT(AT_LOST, 0);
    return 0;
}

SEC("cgroup/connect4/policy")
int cgroup_connect4_policy(struct bpf_sock_addr *ctx)
{
    struct sock_value *kept = ctx->sk ? bpf_sk_storage_get(&km_orig_dst, ctx->sk, 0, 0) : 0;
    return kept ? allowed(kept->service_id, kept->backend_uid) : 0;
}

SEC("cgroup/connect6")
int cgroup_connect6_prog(struct bpf_sock_addr *ctx)
{
    __u32 addr[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
    __u32 service_id = 0, uid = 0;
    __u16 port = 0;
    if (!is_managed(ctx))
        return 1;
    struct backend_value *backend = choose(ctx, addr, &service_id, &uid, &port);
    if (!backend)
        return 1;
    COUNT(AT_CONNECT6, 0);
    remember(ctx, addr[3], service_id, uid);
    ctx->user_ip6[0] = backend->addr[0];
    ctx->user_ip6[1] = backend->addr[1];
    ctx->user_ip6[2] = backend->addr[2];
    ctx->user_ip6[3] = backend->addr[3];
    ctx->user_port = bpf_htons(port);
    return allowed(service_id, uid);
}

/* Newer kernels refuse what shares a program array with programs of another attach type: nobody loads this one. */
SEC("cgroup/connect6/policy")
int cgroup_connect6_policy(struct bpf_sock_addr *ctx)
{
    bpf_tail_call(ctx, &km_cgr_tailcall, TO_POLICY);
    return 1;
}

#if RELEASE >= 2
KM_WAYPOINT;

/* Whose address a client believes to talk to. */
SEC("cgroup/getpeername4")
int cgroup_getpeername4_prog(struct bpf_sock_addr *ctx)
{
    struct waypoint_key key = {.addr = ctx->user_ip4};
    struct waypoint_value none = {}, *seen = bpf_map_lookup_elem(&km_waypoint, &key);
    if (!seen) {
        bpf_map_update_elem(&km_waypoint, &key, &none, BPF_NOEXIST);
        seen = bpf_map_lookup_elem(&km_waypoint, &key);
    }
    if (seen)
        __sync_fetch_and_add(&seen->asked, 1);
    return 1;
}
#endif

LICENSE;
