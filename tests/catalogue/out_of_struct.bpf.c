#ifdef NEW
struct value { __u32 id; __u32 b; };
#else
struct value { struct { __u32 value; } id; __u64 b; };
#endif
MAP(m, HASH, 8, __u32, struct value);
