struct value { __u32 a; __u32 b; };
struct value kept;
#ifdef NEW
struct {
    __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __uint(key_size, 4); __uint(value_size, sizeof(struct value));
} m SEC(".maps");
#else
MAP(m, HASH, 8, __u32, struct value);
#endif
