#ifdef NEW
struct value { __u32 b; struct { __u64 count[2]; } prio; };
#else
struct value { __u32 endpoint_count; __u32 b; };
#endif
MAP(m, HASH, 8, __u32, struct value);
