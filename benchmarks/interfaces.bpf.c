// Two programs for each interface, which do next to nothing: RELEASE makes the releases differ.
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <linux/pkt_cls.h>

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 4);
    __type(key, __u32);
    __type(value, __u64);
} seen SEC(".maps");

static __always_inline void note(void)
{
    __u32 key = RELEASE;
    __u64 *found = bpf_map_lookup_elem(&seen, &key);
    if (found)
        __sync_fetch_and_add(found, 1);
}

SEC("xdp") int early(struct xdp_md *ctx)
{
    note();
    return XDP_PASS;
}

SEC("tc") int late(struct __sk_buff *ctx)
{
    note();
    return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Dual BSD/GPL";
