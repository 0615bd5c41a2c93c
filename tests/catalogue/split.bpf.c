#ifdef NEW
struct first { __u32 a; };
struct second { __u32 b; };
MAP(first, HASH, 8, __u32, struct first);
MAP(second, HASH, 8, __u32, struct second);
#else
struct both { __u32 a; __u32 b; };
MAP(both, HASH, 8, __u32, struct both);
#endif
