/* What is counted of a pod. */
#pragma once
#include "packets.h"

KM_PODS;

static __always_inline struct pod_value *pod_of(__u32 addr)
{
    struct pod_key key = {.addr = {addr}};
    struct pod_value none = {}, *seen = bpf_map_lookup_elem(&km_pods, &key);
    if (seen)
        return seen;
    bpf_map_update_elem(&km_pods, &key, &none, BPF_NOEXIST);
    return bpf_map_lookup_elem(&km_pods, &key);
}
