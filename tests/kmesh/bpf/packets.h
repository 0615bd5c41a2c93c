/* Packets at an interface. */
#pragma once
#include "kmesh.h"

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_OK 0
#define MARK 0xd0

static __always_inline int ip_of(struct __sk_buff *skb, struct iphdr *ip)
{
    return skb->protocol == bpf_htons(ETH_P_IP) && !bpf_skb_load_bytes(skb, ETH_HLEN, ip, sizeof(*ip));
}
