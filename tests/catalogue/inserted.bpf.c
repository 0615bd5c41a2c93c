#ifdef NEW
struct value { __u32 a; __u32 b; __u32 c; };
#else
struct value { __u32 a; __u32 c; };
#endif
MAP(m, HASH, 8, __u32, struct value);
