/* What the maps of release 1 hold. */
#pragma once
#include <linux/types.h>

/* An id says what it is of and which: kind << 24 | number. */
#define KIND_SERVICE 1
#define KIND_BACKEND 2

struct frontend_key { __u32 addr[4]; };
struct frontend_value { __u32 upstream_id; };

struct service_key { __u32 service_id; };
struct service_value {
    __u32 endpoint_count;
    __u32 policy_id;
    __u16 service_port[2];
    __u16 target_port[2];
    __u32 waypoint_id;
};

struct endpoint_key { __u32 service_id; __u32 backend_index; };
struct endpoint_value { __u32 backend_uid; };

struct backend_key { __u32 backend_uid; };
struct backend_value { __u32 addr[4]; __u32 service_count; __u32 services[4]; };

struct policy_key { __u32 policy_id; };
struct policy_value { __u32 action; __u32 port; __u64 hits; };

struct manage_key { __u64 netns_cookie; };
struct manage_value { __u32 marked; };

struct tally_value { __u32 connects; __u32 denied; __u64 last_service; };

struct auth_key { __u32 saddr; __u32 daddr; __u16 dport; __u16 unused; };
struct auth_value { __u8 verdict; __u32 hits; };

struct pod_key { __u32 addr[4]; };
struct pod_value { __u32 rx_udp; __u32 tx_udp; __u64 rx_bytes; __u64 tx_bytes; };

struct hook_value { __u64 packets; __u64 bytes; };

struct node_key { __u32 prefix; __u32 addr; };
struct node_value { __u32 spi; __u32 host; };

struct dns_value { __u32 addr; __u16 port; __u16 unused; __u32 answers; };

struct config_value { __u32 log_level; __u8 authz; };

struct tuple_key { __u32 saddr; __u32 daddr; __u32 sport; __u32 dport; };

struct sock_value { __u32 vip; __u32 vip_port; __u32 service_id; __u32 backend_uid; __u32 messages; __u32 bytes; };

struct tcp_event { __u64 cookie; __u32 backend_uid; __u32 kind; };

#define ROOM_OF_MANAGE 8192
#define TALLY km_tally
