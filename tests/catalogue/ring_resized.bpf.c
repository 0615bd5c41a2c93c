#ifdef NEW
#define ROOM 8192
#else
#define ROOM 4096
#endif
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, ROOM); } events SEC(".maps");
MAP(m, HASH, 8, __u32, __u64);
