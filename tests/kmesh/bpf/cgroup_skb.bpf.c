/* Packets of the mesh's processes. */
#include "kmesh.h"

KM_HOOKS;

static __always_inline void tell(struct __sk_buff *skb, __u32 slot)
{
    struct iphdr ip;
    if (skb->protocol != bpf_htons(ETH_P_IP) || bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)) || ip.protocol != IPPROTO_UDP)
        return;
    COUNT(slot, skb->len);
}

SEC("cgroup_skb/ingress")
int cgroup_skb_ingress_prog(struct __sk_buff *skb)
{
    tell(skb, AT_SKB_INGRESS);
    return 1;
}

SEC("cgroup_skb/egress")
int cgroup_skb_egress_prog(struct __sk_buff *skb)
{
    tell(skb, AT_SKB_EGRESS);
    return 1;
}

LICENSE;
