#ifdef NEW
struct value { __u32 count[3]; __u32 b; };
#else
struct value { __u32 count; __u32 b; };
#endif
MAP(m, HASH, 8, __u32, struct value);
