#ifdef NEW
struct value { __u32 a; __u32 b; };
#else
struct value { __u32 a; };
#endif
MAP(m, HASH, 8, __u32, struct value);
