#ifdef NEW
struct value { __u64 id; };
#else
struct value { __u32 id; };
#endif
MAP(m, HASH, 8, struct value, __u32);
