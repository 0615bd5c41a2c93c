/* What all objects share: the maps, of which each object names those that it uses, and a few words. */
#pragma once
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"

#define SIZED(name, kind, room, flags, key, value)                                                     \
    struct {                                                                                           \
        __uint(type, BPF_MAP_TYPE_##kind);                                                             \
        __uint(max_entries, room);                                                                     \
        __uint(map_flags, flags);                                                                      \
        __uint(key_size, sizeof(key));                                                                 \
        __uint(value_size, sizeof(value));                                                             \
    } name SEC(".maps")

#define LAZY BPF_F_NO_PREALLOC

#define KMESH_VERSION SIZED(kmesh_version, ARRAY, 1, 0, __u32, __u32)
#define KM_CONFIG SIZED(km_config, ARRAY, 1, 0, __u32, struct config_value)
#define KM_FRONTEND SIZED(km_frontend, HASH, 1 << 17, LAZY, struct frontend_key, struct frontend_value)
#define KM_SERVICE SIZED(km_service, HASH, 4096, LAZY, struct service_key, struct service_value)
#define KM_ENDPOINT SIZED(km_endpoint, HASH, 16384, LAZY, struct endpoint_key, struct endpoint_value)
#define KM_BACKEND SIZED(km_backend, HASH, 16384, LAZY, struct backend_key, struct backend_value)
#define KM_POLICIES SIZED(km_authz_policies, HASH, 1024, LAZY, struct policy_key, struct policy_value)
#define KM_MANAGE SIZED(km_manage, HASH, ROOM_OF_MANAGE, LAZY, struct manage_key, struct manage_value)
#define KM_TALLY SIZED(TALLY, HASH, 16384, LAZY, struct backend_key, struct tally_value)
#define KM_AUTH_RES SIZED(km_auth_res, HASH, 65536, LAZY, struct auth_key, struct auth_value)
#define KM_PODS SIZED(km_pods, HASH, 1024, LAZY, struct pod_key, struct pod_value)
#define KM_HOOKS SIZED(km_hooks, PERCPU_ARRAY, 8, 0, __u32, struct hook_value)
#define KM_NODES SIZED(km_nodeinfo, LPM_TRIE, 256, LAZY, struct node_key, struct node_value)
#define KM_DNS SIZED(km_dns_orig, LRU_HASH, 4096, 0, __u64, struct dns_value)
#define KM_SOCKHASH SIZED(km_sockhash, SOCKHASH, 8192, 0, struct tuple_key, __u32)
#define KM_CGR_TAILCALL SIZED(km_cgr_tailcall, PROG_ARRAY, 8, 0, __u32, __u32)
#define KM_XDP_TAILCALL SIZED(km_xdp_tailcall, PROG_ARRAY, 8, 0, __u32, __u32)
#define KM_WAYPOINT SIZED(km_waypoint, HASH, 1024, LAZY, struct waypoint_key, struct waypoint_value)

/* Two kinds that cannot be declared by sizes: the kernel wants to know what a socket's storage holds. */
#define KM_ORIG_DST                                                                                    \
    struct {                                                                                           \
        __uint(type, BPF_MAP_TYPE_SK_STORAGE);                                                         \
        __uint(map_flags, BPF_F_NO_PREALLOC);                                                          \
        __type(key, int);                                                                              \
        __type(value, struct sock_value);                                                              \
    } km_orig_dst SEC(".maps")
#define KM_TCP_PROBE                                                                                   \
    struct {                                                                                           \
        __uint(type, BPF_MAP_TYPE_RINGBUF);                                                            \
        __uint(max_entries, 1 << 18);                                                                  \
    } km_tcp_probe SEC(".maps")

/* Where km_hooks counts what. */
enum { AT_CONNECT4, AT_CONNECT6, AT_SOCKOPS, AT_SK_MSG, AT_SKB_INGRESS, AT_SKB_EGRESS, AT_XDP, AT_LOST };

#define COUNT(slot, size)                                                                              \
    do {                                                                                               \
        __u32 at = slot;                                                                               \
        struct hook_value *seen = bpf_map_lookup_elem(&km_hooks, &at);                                 \
        if (seen) {                                                                                    \
            __sync_fetch_and_add(&seen->packets, 1);                                                   \
            __sync_fetch_and_add(&seen->bytes, size);                                                  \
        }                                                                                              \
    } while (0)

#define LICENSE char _license[] SEC("license") = "Dual BSD/GPL"
