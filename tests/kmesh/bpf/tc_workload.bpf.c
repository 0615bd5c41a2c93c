/* What comes to a pod. */
#include "pods.h"

SEC("tc_ingress")
int tc_workload_prog(struct __sk_buff *skb)
{
    struct iphdr ip;
    if (!ip_of(skb, &ip))
        return TC_ACT_UNSPEC;
    struct pod_value *pod = pod_of(ip.daddr);
    if (pod && ip.protocol == IPPROTO_UDP) {
        __sync_fetch_and_add(&pod->rx_udp, 1);
        __sync_fetch_and_add(&pod->rx_bytes, skb->len);
    }
    return TC_ACT_UNSPEC;
}

LICENSE;
