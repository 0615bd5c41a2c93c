/* What leaves a pod gets the mark of the node that it goes to. */
#include "pods.h"

KM_NODES;

SEC("tc_egress")
int tc_mark_encrypt_prog(struct __sk_buff *skb)
{
    struct iphdr ip;
    if (!ip_of(skb, &ip))
        return TC_ACT_OK;
    struct node_key key = {.prefix = 32, .addr = ip.daddr};
    struct node_value *node = bpf_map_lookup_elem(&km_nodeinfo, &key);
    if (node)
        skb->mark = MARK | node->spi << 8;
    struct pod_value *pod = pod_of(ip.saddr);
    if (pod && ip.protocol == IPPROTO_UDP) {
        __sync_fetch_and_add(&pod->tx_udp, 1);
        __sync_fetch_and_add(&pod->tx_bytes, skb->len);
    }
    return TC_ACT_OK;
}

LICENSE;
