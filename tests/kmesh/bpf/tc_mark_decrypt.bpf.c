/* What comes from a node that encrypts is marked as such, behind what counts it. */
#include "packets.h"

KM_NODES;

__u64 from_nodes;

SEC("tc_ingress")
int tc_mark_decrypt_prog(struct __sk_buff *skb)
{
    struct iphdr ip;
    if (!ip_of(skb, &ip))
        return TC_ACT_OK;
    struct node_key key = {.prefix = 32, .addr = ip.saddr};
    struct node_value *node = bpf_map_lookup_elem(&km_nodeinfo, &key);
    if (node && ip.protocol == IPPROTO_UDP) {
        skb->mark = MARK;
        __sync_fetch_and_add(&from_nodes, 1);
    }
    return TC_ACT_OK;
}

LICENSE;
