// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// One map of every type, with whatever a definition can say, types of every kind, and data sections of every sort.

typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned int __u32; typedef unsigned long long __u64;
typedef signed char __s8; typedef short __s16; typedef int __s32; typedef long long __s64;
typedef __u16 __be16; typedef __u32 __be32;
#define SEC(name) __attribute__((section(name), used))
#define TAG(text) __attribute__((btf_decl_tag(text)))
#define __uint(name, val) int (*name)[val]
#define __type(name, val) __typeof__(val) *name
#define __array(name, val) __typeof__(val) *name[]

// Sizes are powers of two above a page, as libbpf rounds those of ring buffers up to one, by the machine's page size.
#define OF_TYPE(number, entries, kind) struct { __uint(type, number); __uint(max_entries, entries); \
    __uint(key_size, 4); __uint(value_size, 8); } a_##kind SEC(".maps");
OF_TYPE(1, 8192, hash)
OF_TYPE(2, 16384, array)
OF_TYPE(3, 32768, prog_array)
OF_TYPE(4, 65536, perf_event_array)
OF_TYPE(5, 131072, percpu_hash)
OF_TYPE(6, 262144, percpu_array)
OF_TYPE(7, 524288, stack_trace)
OF_TYPE(8, 4096, cgroup_array)
OF_TYPE(9, 8192, lru_hash)
OF_TYPE(10, 16384, lru_percpu_hash)
OF_TYPE(11, 32768, lpm_trie)
OF_TYPE(14, 262144, devmap)
OF_TYPE(15, 524288, sockmap)
OF_TYPE(16, 4096, cpumap)
OF_TYPE(17, 8192, xskmap)
OF_TYPE(18, 16384, sockhash)
OF_TYPE(19, 32768, cgroup_storage)
OF_TYPE(20, 65536, reuseport_sockarray)
OF_TYPE(21, 131072, percpu_cgroup_storage)
OF_TYPE(22, 262144, queue)
OF_TYPE(23, 524288, stack)
OF_TYPE(24, 4096, sk_storage)
OF_TYPE(25, 8192, devmap_hash)
OF_TYPE(27, 32768, ringbuf)
OF_TYPE(28, 65536, inode_storage)
OF_TYPE(29, 131072, task_storage)
OF_TYPE(30, 262144, bloom_filter)
OF_TYPE(31, 524288, user_ringbuf)
OF_TYPE(32, 4096, cgrp_storage)

enum e { LOW = -3, HIGH = 7 }; enum big { FAR = 1ULL << 40 }; enum __attribute__((packed)) tiny { ONE = 1 };
typedef struct { int x; char c; } anonymous; typedef anonymous again; struct later;
struct key { __u8 addr[16]; __be16 port; const volatile __u8 proto; __u8 pad; };
struct __attribute__((packed)) tight { __u8 a; __u64 b; __u16 c; };
struct value {
    __u64 hits TAG("hitless:merge=sum"); again nested[3]; struct tight t; __u32 low:3, high:9; __u64 wide:40; __u32:0;
    __s8 tail:2; enum e e; enum big big; enum tiny tiny; union { __u32 v4; __u8 v6[16]; struct { __u16 p, q; }; };
    _Bool on; char text[12]; double d; float f; void *any; struct later *next; struct value *self;
    int (*call)(struct key *, int); __u32 grid[3][5]; __int128 huge; long l; signed char sc; __u8 flexible[];
};
struct { __uint(type, 1); __uint(max_entries, 1024); __uint(map_flags, 1); __uint(pinning, 1); __uint(numa_node, 0);
    __type(key, struct key); __type(value, struct value); } typed SEC(".maps") TAG("hitless:was=vip");
struct { __uint(type, 30); __uint(max_entries, 9); __uint(map_extra, 5); __type(value, __u64); } bloom SEC(".maps");
struct { __uint(type, 24); __uint(map_flags, 1); __type(key, int); __type(value, again); } storage SEC(".maps");
struct inner { __uint(type, 2); __uint(max_entries, 3); __type(key, __u32); __type(value, again); };
struct { __uint(type, 13); __uint(max_entries, 5); __type(key, __u32); __array(values, struct inner); }
    outer SEC(".maps");
struct { __uint(type, 12); __uint(max_entries, 2); __uint(key_size, 4); __array(values, struct {
    __uint(type, 1); __uint(max_entries, 7); __uint(map_flags, 1); __uint(key_size, 8); __uint(value_size, 24); }); }
    sized SEC(".maps");
int act(void *ctx);
struct { __uint(type, 3); __uint(max_entries, 2); __uint(key_size, 4); __array(values, int (void *)); }
    tails SEC(".maps") = { .values = { [1] = (void *)&act } };
struct { __uint(type, 3); __uint(max_entries, 2); __array(values, int (void *)); } keyless SEC(".maps");
struct inner slot SEC(".maps");
struct { __uint(type, 13); __uint(max_entries, 5); __type(key, __u32); __array(values, struct inner); }
    slots SEC(".maps") = { .values = { [2] = &slot } };

int one = 3, two = 4; static volatile int hidden; __u64 counts[4]; static volatile struct tight quiet = { .b = 1 };
const volatile __u32 limit = 9; const volatile anonymous pair SEC(".rodata.more") = { 1, 2 };
int internal SEC(".data.internal") __attribute__((visibility("hidden"))) = 5;
static volatile int lone SEC(".data.lone") = 5; struct value last SEC(".bss.last");
static __attribute__((noinline)) int helper(int x) { return x * hidden; }
SEC("cgroup/connect4") int connect4(void *ctx) {
    counts[1] += limit + quiet.b + lone + internal + pair.x; hidden = 1; return helper(one + two) + last.l;
}
SEC("?sockops") int ops(void *ctx) { return 1; }
SEC("cgroup_skb/ingress") int count(void *ctx) { return 1; }
SEC("xdp") int act(void *ctx) { return 2; }
SEC("tc") int shape(void *ctx) { return 0; }
SEC("xdp_auth") int auth(void *ctx) { return 2; }
SEC("kprobe/do_exit") int probe(void *ctx) { return 0; }
SEC("iter/bpf_map_elem") int walk(void *ctx) { return 0; }
char LICENSE[] SEC("license") = "Dual BSD/GPL";
