/* Whoever wants to connect to a pod is looked at before anything else. */
#include "kmesh.h"

KM_AUTH_RES;
KM_XDP_TAILCALL;
KM_CONFIG;
KM_HOOKS;

enum { ALLOWED = 1 };
enum { TO_CHECK };

struct found { struct iphdr *ip; struct tcphdr *tcp; };

static __always_inline int asks(struct xdp_md *ctx, struct found *at)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = data;
    at->ip = (void *)(eth + 1);
    at->tcp = (void *)(at->ip + 1);
    if ((void *)(at->tcp + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP))
        return 0;
    return at->ip->ihl == 5 && at->ip->protocol == IPPROTO_TCP && at->tcp->syn && !at->tcp->ack;
}

SEC("xdp_auth")
int xdp_auth_prog(struct xdp_md *ctx)
{
    struct found at = {};
    __u32 zero = 0;
    struct config_value *config = bpf_map_lookup_elem(&km_config, &zero);
    if (!config || !config->authz || !asks(ctx, &at))
        return XDP_PASS;
    COUNT(AT_XDP, 0);
    bpf_tail_call(ctx, &km_xdp_tailcall, TO_CHECK);
    COUNT(AT_LOST, 0);
    return XDP_DROP;
}

SEC("xdp_auth/check")
int xdp_auth_check(struct xdp_md *ctx)
{
    struct found at = {};
    if (!asks(ctx, &at))
        return XDP_DROP;
    struct auth_key key = {};
    key.saddr = at.ip->saddr;
    key.daddr = at.ip->daddr;
    key.dport = bpf_ntohs(at.tcp->dest);
    struct auth_value *seen = bpf_map_lookup_elem(&km_auth_res, &key), fresh;
    if (!seen) {
        __builtin_memset(&fresh, 0, sizeof(fresh));
        fresh.verdict = ALLOWED;
        bpf_map_update_elem(&km_auth_res, &key, &fresh, BPF_NOEXIST);
        seen = bpf_map_lookup_elem(&km_auth_res, &key);
    }
    if (!seen)
        return XDP_DROP;
    __sync_fetch_and_add(&seen->hits, 1);
#if RELEASE >= 2
    seen->reason = 2;
#endif
    return XDP_PASS;
}

LICENSE;
