// The object that the soak adds to each of meshd's releases: it counts what clients send by UDP, message by message
// and byte by byte, and holds rules and prefixes that only the control plane writes. RELEASE is 1, 2 or 3, and so is the layout.

#define EGRESS 1
#define UDP 17
#define HEADER 8

// By account, which is the first word of each message; entries are made by the program.
#if RELEASE == 1
struct sent {
    __u32 messages TAG("merge=sum");
    __u64 bytes TAG("merge=sum");
};
MAP(sent, HASH, 65536, __u32, struct sent);
#define SENT sent
#define MESSAGES(of) ((of)->messages)
#define BYTES(of) ((of)->bytes)
#elif RELEASE == 2 // moved and widened
struct sent {
    __u64 first_ns;
    __u64 bytes TAG("merge=sum");
    __u64 messages TAG("merge=sum");
};
MAP(sent, HASH, 65536, __u32, struct sent);
#define SENT sent
#define MESSAGES(of) ((of)->messages)
#define BYTES(of) ((of)->bytes)
#else // nested and renamed, the map renamed
struct volume {
    __u64 messages TAG("merge=sum");
    __u64 octets TAG("merge=sum");
};
struct sent {
    __u32 flags;
    struct volume volume;
    __u64 first_ns;
};
MAP(traffic, HASH, 131072, __u32, struct sent);
#define SENT traffic
#define MESSAGES(of) ((of)->volume.messages)
#define BYTES(of) ((of)->volume.octets)
#endif

// By size of the message, an array that needs no entry to be made.
#if RELEASE == 1
struct size { __u32 count TAG("merge=sum"); };
#elif RELEASE == 2
struct size { __u64 count TAG("merge=sum"); };
#else
struct size { __u64 last_ns; __u64 count TAG("merge=sum"); };
#endif
MAP(size, ARRAY, 64, __u32, struct size);

// By the last bits of the account, a value for each CPU.
#if RELEASE == 1
struct share { __u32 count TAG("merge=sum"); };
#elif RELEASE == 2
struct share { __u64 count TAG("merge=sum"); };
#else
struct share { __u64 last_ns; __u64 count TAG("merge=sum"); };
#endif
MAP(share, PERCPU_HASH, 1024, __u32, struct share);

// Names stay, places change: in the key as well.
#if RELEASE == 1
struct rule_key { __u32 id; __u32 zone; };
struct rule { __u32 rate; __u16 burst; };
#elif RELEASE == 2
struct rule_key { __u32 id; __u32 zone; };
struct rule { __u16 burst; __u64 rate; __u32 spare; };
#else
struct rule_key { __u32 zone; __u32 id; };
struct rule { __u32 class TAG("default=7"); __u32 burst; __u64 rate; };
#endif
MAP(rule, HASH, 4096, struct rule_key, struct rule);

struct prefix_key { __u32 prefixlen; __u8 addr[4]; };
#if RELEASE == 1
struct prefix { __u32 hop; };
#elif RELEASE == 2
struct prefix { __u64 hop; };
#else
struct prefix { __u32 metric; __u64 hop; };
#endif
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __uint(max_entries, 4096);
    __type(key, struct prefix_key);
    __type(value, struct prefix);
} prefix SEC(".maps");

SEC("cgroup_skb/egress") int meter(struct __sk_buff *skb)
{
    __u8 start[10], words;
    __u32 account, length, index;
    __be16 udp_length;
    struct sent *to;
    struct size *in;
    struct share *part;

    if (bpf_skb_load_bytes(skb, 0, start, sizeof(start)) || start[0] >> 4 != 4 || start[9] != UDP)
        return EGRESS;
    words = start[0] & 15;
    if (bpf_skb_load_bytes(skb, words * 4 + 4, &udp_length, sizeof(udp_length)) ||
        bpf_skb_load_bytes(skb, words * 4 + HEADER, &account, sizeof(account)))
        return EGRESS;
    length = __builtin_bswap16(udp_length) - HEADER;
    to = bpf_map_lookup_elem(&SENT, &account);
    if (!to) {
        struct sent none = {};

        bpf_map_update_elem(&SENT, &account, &none, BPF_NOEXIST);
        to = bpf_map_lookup_elem(&SENT, &account);
        if (!to)
            return EGRESS;
    }
    __sync_fetch_and_add(&MESSAGES(to), 1);
    __sync_fetch_and_add(&BYTES(to), length);
    index = length & 63;
    in = bpf_map_lookup_elem(&size, &index);
    if (in)
        __sync_fetch_and_add(&in->count, 1);
    index = account & 1023;
    part = bpf_map_lookup_elem(&share, &index);
    if (!part) {
        struct share none = {};

        bpf_map_update_elem(&share, &index, &none, BPF_NOEXIST);
        part = bpf_map_lookup_elem(&share, &index);
    }
    if (part) // atomic, since another task may run here in the middle of an addition
        __sync_fetch_and_add(&part->count, 1);
    return EGRESS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
