/* What is sent on connections to services is counted, for each of them and in all. */
#include "kmesh.h"

KM_ORIG_DST;
KM_HOOKS;

SEC("sk_msg")
int sendmsg_prog(struct sk_msg_md *msg)
{
    COUNT(AT_SK_MSG, msg->size);
    struct sock_value *kept = msg->sk ? bpf_sk_storage_get(&km_orig_dst, msg->sk, 0, 0) : 0;
    if (!kept)
        return SK_PASS;
    __sync_fetch_and_add(&kept->messages, 1);
    __sync_fetch_and_add(&kept->bytes, msg->size);
#if RELEASE >= 2
    if (!kept->first_seen)
        kept->first_seen = bpf_ktime_get_ns();
#endif
    return SK_PASS;
}

LICENSE;
