#ifdef NEW
struct value { enum { TCP = 6, UDP = 17 } proto; __u64 a; };
#else
struct value { enum { TCP = 6 } proto; __u32 a; };
#endif
MAP(m, HASH, 8, __u32, struct value);
