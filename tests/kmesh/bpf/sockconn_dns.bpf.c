/* Questions to the address of the cluster's DNS go to one backend, and its answers come from that address. */
#include "kmesh.h"

KM_FRONTEND;
KM_SERVICE;
KM_ENDPOINT;
KM_BACKEND;
KM_DNS;

#define DNS_PORT bpf_htons(53)

SEC("cgroup/sendmsg4")
int cgroup_sendmsg4_prog(struct bpf_sock_addr *ctx)
{
    if ((__u16)ctx->user_port != DNS_PORT)
        return 1;
    struct frontend_key front = {.addr = {ctx->user_ip4}};
    struct frontend_value *upstream = bpf_map_lookup_elem(&km_frontend, &front);
    if (!upstream)
        return 1;
    struct service_key wanted = {.service_id = upstream->upstream_id};
    struct service_value *service = bpf_map_lookup_elem(&km_service, &wanted);
    struct endpoint_key place = {.service_id = upstream->upstream_id};
    struct endpoint_value *endpoint = bpf_map_lookup_elem(&km_endpoint, &place);
    if (!service || !endpoint)
        return 1;
    struct backend_key one = {.backend_uid = endpoint->backend_uid};
    struct backend_value *backend = bpf_map_lookup_elem(&km_backend, &one);
    if (!backend)
        return 1;
    __u64 cookie = bpf_get_socket_cookie(ctx);
    struct dns_value fresh = {.addr = ctx->user_ip4, .port = 53};
    struct dns_value *kept = bpf_map_lookup_elem(&km_dns_orig, &cookie);
    if (!kept)
        bpf_map_update_elem(&km_dns_orig, &cookie, &fresh, BPF_NOEXIST);
#if RELEASE >= 2
    kept = bpf_map_lookup_elem(&km_dns_orig, &cookie);
    if (kept)
        __sync_fetch_and_add(&kept->asked, 1);
#endif
    ctx->user_ip4 = backend->addr[0];
    ctx->user_port = bpf_htons(service->target_port[0]);
    return 1;
}

SEC("cgroup/recvmsg4")
int cgroup_recvmsg4_prog(struct bpf_sock_addr *ctx)
{
    __u64 cookie = bpf_get_socket_cookie(ctx);
    struct dns_value *kept = bpf_map_lookup_elem(&km_dns_orig, &cookie);
    if (!kept)
        return 1;
    __sync_fetch_and_add(&kept->answers, 1);
    ctx->user_ip4 = kept->addr;
    ctx->user_port = bpf_htons(kept->port);
    return 1;
}

LICENSE;
