#ifdef NEW
#define ROOM 16
#define FLAGS BPF_F_NO_PREALLOC
#else
#define ROOM 8
#define FLAGS 0
#endif
struct {
    __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, ROOM); __uint(map_flags, FLAGS);
    __type(key, __u32); __type(value, __u64);
} m SEC(".maps");
