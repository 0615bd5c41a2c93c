/* Connections that come to be are put where sk_msg finds them, and told to who listens. */
#include "kmesh.h"

KM_SOCKHASH;
KM_ORIG_DST;
KM_TCP_PROBE;
KM_HOOKS;
KMESH_VERSION;

__u64 established;
#if RELEASE >= 2
__u64 accepted;
#endif
__u64 closed;
__u64 untold;

SEC("sockops")
int sockops_prog(struct bpf_sock_ops *ops)
{
    struct tuple_key key = {};
    struct sock_value *kept;
    struct tcp_event event = {};
    switch (ops->op) {
#if RELEASE >= 2
    case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
        __sync_fetch_and_add(&accepted, 1);
        break;
#endif
    case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
        kept = ops->sk ? bpf_sk_storage_get(&km_orig_dst, ops->sk, 0, 0) : 0;
        __sync_fetch_and_add(&established, 1);
        COUNT(AT_SOCKOPS, 0);
        key.saddr = ops->local_ip4;
        key.daddr = ops->remote_ip4;
        key.sport = ops->local_port;
        key.dport = bpf_ntohl(ops->remote_port);
        bpf_sock_hash_update(ops, &km_sockhash, &key, BPF_ANY);
        bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
        event.cookie = bpf_get_socket_cookie(ops);
        event.backend_uid = kept ? kept->backend_uid : 0;
        event.kind = ops->op;
        if (bpf_ringbuf_output(&km_tcp_probe, &event, sizeof(event), 0))
            __sync_fetch_and_add(&untold, 1);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        if (ops->args[1] == BPF_TCP_CLOSE)
            __sync_fetch_and_add(&closed, 1);
        break;
    }
    return 1;
}

LICENSE;
